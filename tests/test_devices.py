"""GPUs that a profile asks for and this machine does not have: a named error at once, wherever it is asked."""

from pathlib import Path

import pytest

from relora_train import devices
from relora_train.devices import check_devices, sharing_ranks
from relora_train.distributed import process_group
from relora_train.errors import DeviceError
from relora_train.runs.workers import join_run
from relora_train.settings.running import LaunchConfig


def test_a_machine_without_the_gpus_of_its_ranks_does_not_join(monkeypatch: pytest.MonkeyPatch):
    """Not even when nobody answers at the endpoint, and before it waits there."""
    monkeypatch.setattr(devices, "usable_gpus", lambda: 1)
    place = {"rdzv_endpoint": "127.0.0.1:9", "nnodes": 2, "node_rank": 1, "device": "auto"}
    with pytest.raises(DeviceError, match="nproc_per_node is 8"):
        join_run(**place, nproc_per_node="8", wait_seconds=600, tell=print)


@pytest.mark.parametrize(
    ("files", "environment", "sign"),
    [
        (["nvidia0", "nvidiactl"], {}, "/nvidia0"),
        ([], {"NVIDIA_VISIBLE_DEVICES": "all"}, "NVIDIA_VISIBLE_DEVICES=all"),
        ([], {"NVIDIA_VISIBLE_DEVICES": "void"}, None),
        (["null"], {}, None),
        (["nvidia0"], {"CUDA_VISIBLE_DEVICES": "-1"}, None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_of_before_the_cpu_is_taken(
    files: list[str],
    environment: dict[str, str],
    sign: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "_DEVICE_FILES", tmp_path)
    monkeypatch.setattr(devices, "usable_gpus", lambda: 0)
    for device in ("cpu", "auto", "auto"):
        devices.warn_of_unused_gpu.cache_clear() if device == "cpu" else None
        with process_group(device) as ranks:
            assert ranks.device.type == "cpu"
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [sign in message for message in told] == ([True] if sign else []), told


@pytest.mark.parametrize(
    ("gpus", "launch", "fault"),
    [
        (0, {"device": "cuda"}, r"launch\.device is 'cuda', but torch sees no GPU here: .+"),
        (0, {"nproc_per_node": "gpu"}, r"launch\.nproc_per_node is 'gpu'.* sees none here: .+"),
        (1, {"nproc_per_node": 2}, r"nproc_per_node is 2, but torch sees 1 GPU on"),
        (2, {"device": "cuda", "nproc_per_node": 3}, r"nproc_per_node is 3, but torch sees 2 GPUs on"),
        (0, {"nproc_per_node": 3}, None),
        (0, {"device": "cpu", "nproc_per_node": 3}, None),
        (2, {"device": "cpu", "nproc_per_node": 3}, None),
        (2, {"device": "cuda", "nproc_per_node": 2}, None),
        (1, {"device": "cuda", "nproc_per_node": "gpu"}, None),
    ],
)
def test_ranks_without_a_gpu_of_their_own_are_refused(
    gpus: int, launch: dict[str, object], fault: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "usable_gpus", lambda: gpus)
    if fault is None:
        check_devices(LaunchConfig.model_validate(launch))
        return
    with pytest.raises(DeviceError, match=fault) as caught:
        check_devices(LaunchConfig.model_validate(launch))
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("gpus", "launch", "ranks"),
    [
        (8, {"device": "cuda", "nproc_per_node": 8}, 1),
        (8, {"device": "cuda", "nproc_per_node": 8, "sharding": "full"}, 8),
        (8, {"device": "cuda", "nproc_per_node": "gpu", "sharding": "full"}, 8),
        (2, {"device": "cuda", "nproc_per_node": 8, "sharding": "full"}, 2),
        (0, {"device": "cuda", "nproc_per_node": 8, "sharding": "full"}, 8),
        (0, {"device": "cuda", "nproc_per_node": "gpu", "sharding": "full"}, 1),
        (2, {"device": "cpu", "nproc_per_node": 3, "sharding": "full"}, 3),
    ],
)
def test_a_model_is_shared_on_another_machine_by_as_many_ranks_as_it_has_gpus(
    gpus: int, launch: dict[str, object], ranks: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "usable_gpus", lambda: gpus)
    machines = {"nnodes": 2, "rdzv_endpoint": "127.0.0.1:9"}
    assert sharing_ranks(LaunchConfig.model_validate(launch | machines)).world_size == ranks
