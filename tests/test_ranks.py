"""Several ranks train the one model that one process trains; one of them may be lost."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from failing_worker import FailingRequest
from safetensors.torch import load_file
from stage_runs import ignore, metrics_of, stage_request, tiny_profile

from relora_train.checkpoints.snapshots import local_snapshots
from relora_train.distributed import SLOW, STEP, Ranks, process_group
from relora_train.errors import ConfigError, DeviceError, DeviceMemoryError, ReLoRAError, TrainerCrashedError
from relora_train.events import Event
from relora_train.process import is_out_of_memory
from relora_train.runs.workers import Worker, run_worker
from relora_train.settings.profile import Profile
from relora_train.settings.running import LaunchConfig, PrecisionConfig
from relora_train.training.build import prepare_stage
from relora_train.training.files import SavedOptimizerState, read_training_state
from relora_train.training.requests import StageRequest
from relora_train.training.trainer import run_stage

STEPS = 30
CLIPPED_TO = 0.01
TWO = {"nproc_per_node": 2, "threads": 1}


def profile_of(**sections: Any) -> Profile:
    """A cycle without dropout, whose masks would differ between numbers of ranks. Two ranks have 5 and 4 sequences, in
    passes of 3, 2 and 3, 1; every update is clipped.
    """
    schedule = {"warm_start_steps": 0, "cycles": 1, "cycle_length": STEPS, "warmup_steps": 4}
    batch, optimizer = {"sequences": 9, "micro_sequences": 3}, {"max_grad_norm": CLIPPED_TO}
    settings = {"relora": {"dropout": 0.0}, "schedule": schedule, "batch": batch, "optimizer": optimizer, "launch": TWO}
    return tiny_profile(**settings | sections)


def by_two_ranks(request: StageRequest, *, module: str = "relora_train.training.trainer", on_event: Any = None) -> None:
    path = request.output_directory.parent / "request.json"
    run_worker(module, request, path, on_event=on_event or (lambda event: None), launch=LaunchConfig(nproc_per_node=2))


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cycle as one process trains it, each batch in one pass."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run_stage(stage_request(profile_of(batch={"sequences": 9}), "cycle-1", dataset, out), ignore)
    return out


@pytest.fixture(scope="module")
def together(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cycle by two ranks, whose system's temporary directory is `tmp` beside it."""
    out = tmp_path_factory.mktemp("together") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(out.parent / "tmp"))
        (out.parent / "tmp").mkdir()
        by_two_ranks(stage_request(profile_of(), "cycle-1", dataset, out))
    return out


def assert_same_up_to_rounding(one: Path, other: Path, *, rounding: float = 1e-5) -> None:
    """Losses, gradient norms, merged weights and the optimizer's state after the reset: float32 gradients summed in
    another order.
    """
    for key, times in (("loss", 1), ("grad_norm", 100)):
        found, expected_values = [[record[key] for record in metrics_of(checkpoint)] for checkpoint in (one, other)]
        assert found == pytest.approx(expected_values, rel=times * rounding), key
    weights, expected = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name in expected:  # Adam's steps are as long for a tiny gradient as for a large one
        torch.testing.assert_close(weights[name], expected[name], rtol=100 * rounding, atol=10 * rounding)
    states = [SavedOptimizerState(checkpoint / "optimizer.safetensors") for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, expected_state in states[1].items():
        for key, value in expected_state.items():
            atol = 10 * rounding * float(value.abs().max())
            torch.testing.assert_close(states[0][name][key], value, rtol=100 * rounding, atol=atol)
        if "lora_" in name:  # pruned by the same mask
            kept = [state[name]["exp_avg"] != 0 for state in states]
            assert torch.equal(kept[0], kept[1]) and 0 < kept[0].sum() < 0.1 * kept[0].numel()


def test_two_ranks_give_the_single_process_result_up_to_rounding(alone: Path, together: Path):
    """Shares and passes of unequal size weigh by their sequences, and the sum over ranks is what is clipped."""
    assert all(record["grad_norm"] > 2 * CLIPPED_TO for record in metrics_of(alone))
    assert_same_up_to_rounding(together, alone)


def test_ranks_leave_nothing_in_the_systems_temporary_directory(together: Path):
    assert list((together.parent / "tmp").iterdir()) == []


# --- what each rank does


@pytest.fixture(scope="module")
def probed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks recorded of a cycle with dropout, one sequence a micro-step, shares of 4 and 3, where the first
    rank measured with what precision both multiply.
    """
    out = tmp_path_factory.mktemp("probe") / "out"
    schedule = {"warm_start_steps": 0, "cycles": 1, "cycle_length": 6}
    batch = {"sequences": 7, "micro_sequences": 1}
    profile = tiny_profile(batch=batch, schedule=schedule, relora={"dropout": 0.3}, launch=TWO)
    profile = profile.model_copy(update={"precision": PrecisionConfig(matmul_precision="auto")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        by_two_ranks(stage_request(profile, "cycle-1", dataset, out), module="rank_probe")
    assert read_training_state(out).matmul_precision in ("highest", "high", "medium")
    return [json.loads((out.parent / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_all_ranks_hold_the_same_weights_reinit_and_optimizer_state(probed: list[dict[str, Any]]):
    first, second = probed
    assert first["tensors"] == second["tensors"] and any("lora_A" in name for name in first["tensors"])
    assert first["state"] == second["state"] and any("lora_B.exp_avg_sq" in name for name in first["state"])


def test_every_rank_and_micro_step_has_a_dropout_of_its_own(probed: list[dict[str, Any]]):
    masks = Counter(mask for seen in probed for step in seen["dropout_masks"] for mask in step)
    assert all(len(seen["dropout_masks"]) == 6 for seen in probed)
    assert set(masks.values()) == {2}  # the one of the forward pass is made again for the backward pass
    assert len(masks) == 6 * (4 + 3) * 8  # updates, micro-steps of both ranks, inputs that wrapped layers read


def test_gradients_are_sent_once_an_update_and_nothing_else_of_their_size(probed: list[dict[str, Any]]):
    for seen in probed:
        assert len(seen["messages"]) == 6
        for sizes in seen["messages"]:
            assert [size for size in sizes if size > 100] == [seen["gradient_entries"]]  # beside sums, a flag a layer


def test_only_the_first_rank_makes_the_run_s_first_weights_and_commits(probed: list[dict[str, Any]]):
    assert [seen["built"] for seen in probed] == [1, 0]
    assert [seen["committed"] for seen in probed] == [True, False]


def test_first_weights_are_gone_with_their_stage(together: Path):
    assert [path.name for path in together.parent.glob("out*")] == ["out"]


def test_more_ranks_than_sequences_are_refused_also_when_only_the_start_tells(dataset: Path, tmp_path: Path):
    request = stage_request(profile_of(launch={"nproc_per_node": "gpu"}), "cycle-1", dataset, tmp_path / "out")
    with pytest.raises(ConfigError, match="leaves some of 10 ranks without a sequence"):
        prepare_stage(request, Ranks(rank=0, world_size=10, device=torch.device("cpu")))


# --- a lost rank


def ranks_below(pid: int) -> list[int]:
    """All ranks on this machine, from the process id of one: the children of their launcher."""
    launcher = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.fixture(scope="module")
def snapshot_of_the_lost(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest snapshot of the cycle by two ranks, the second of which was killed."""
    root = tmp_path_factory.mktemp("killed")
    profile = profile_of(snapshots={"every_steps": 5, "every_seconds": None})
    request = stage_request(profile, "cycle-1", dataset, root / "out")
    pids: list[int] = []

    def kill_the_second(event: Event) -> None:
        if event["event"] == "stage_started":
            pids.extend(ranks_below(event["pid"]))
            pids.remove(event["pid"])
        elif event["event"] == "snapshot_committed" and event["step"] >= 10 and pids:
            os.kill(pids.pop(), signal.SIGKILL)

    with pytest.raises(TrainerCrashedError, match="Rank 0 of 2 lost another one") as caught:
        by_two_ranks(request.model_copy(update={"snapshots_directory": root / "snapshots"}), on_event=kill_the_second)
    assert caught.value.retryable
    assert not (root / "out" / "manifest.json").exists() and not pids
    newest = max(local_snapshots(root / "snapshots"))
    assert 10 <= int(newest.split("-")[1]) < STEPS
    return root / "snapshots" / newest


def test_after_a_lost_rank_as_many_ranks_go_on_to_the_same_bits(
    dataset: Path, together: Path, snapshot_of_the_lost: Path, tmp_path: Path
):
    request = stage_request(profile_of(), "cycle-1", dataset, tmp_path / "out")
    by_two_ranks(request.model_copy(update={"snapshot_directory": snapshot_of_the_lost}))
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (tmp_path / "out" / name).read_bytes() == (together / name).read_bytes(), name


def test_after_a_lost_rank_a_single_one_goes_on_to_the_same_result_up_to_rounding(
    dataset: Path, together: Path, snapshot_of_the_lost: Path, tmp_path: Path
):
    request = stage_request(profile_of(launch={"nproc_per_node": 1}), "cycle-1", dataset, tmp_path / "out")
    run_stage(request.model_copy(update={"snapshot_directory": snapshot_of_the_lost}), ignore)
    assert_same_up_to_rounding(tmp_path / "out", together)


def fail_as_second_rank(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReLoRAError:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(ReLoRAError) as caught:
        request = FailingRequest(kind=kind)
        run_worker(
            "failing_worker", request, tmp_path / "r.json", on_event=ignore, launch=LaunchConfig(nproc_per_node=2)
        )
    return caught.value


def test_one_ranks_error_is_told_though_the_others_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a group that nobody can leave, as NCCL's in the middle of a message; and what the others say is no cause."""
    error = fail_as_second_rank("rank out of memory", tmp_path, monkeypatch)
    assert type(error) is DeviceMemoryError and "Tried to allocate 20.00 GiB" in str(error)


def test_a_rank_that_hangs_is_lost_after_the_time_that_an_update_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error = fail_as_second_rank("rank hangs", tmp_path, monkeypatch)
    assert type(error) is TrainerCrashedError and "Rank 0 of 2 lost another one" in str(error)


def test_updates_have_a_short_time_and_what_comes_before_and_after_a_long_one(probed: list[dict[str, Any]]):
    for seen in probed:
        assert seen["limits"] == [[1, STEP.total_seconds()], [6, SLOW.total_seconds()]]
    assert STEP < SLOW


NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {what}, NCCL version 2.27.5\n"
    "{kind}: a general remark.\nLast error:\n{last}"
)


@pytest.mark.parametrize(
    ("what", "kind", "last", "error", "told"),
    [
        (
            "remote process exited",
            "ncclRemoteError",
            "socketProgress: Connection closed by",
            TrainerCrashedError,
            "soc",
        ),
        ("invalid usage", "ncclInvalidUsage", "Duplicate GPU detected : rank 0 and 1", DeviceError, "Duplicate GPU"),
        (
            "unhandled system error",
            "ncclSystemError",
            "shared memory segment /dev/shm/nccl-1",
            dist.DistError,
            "/dev/shm",
        ),
        ("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'", dist.DistError, "out of"),
    ],
)
def test_what_nccl_says_last_decides_and_is_told(what: str, kind: str, last: str, error: type[Exception], told: str):
    """Those that are raised as they are get their names from the process, as on a machine with one rank."""
    with pytest.raises(error, match=told) as caught, process_group("cpu"):
        raise dist.DistBackendError(NCCL.format(what=what, kind=kind, last=last))
    assert is_out_of_memory(caught.value) == ("out of memory" in last)


# --- several machines


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def machine_that_joins(endpoint: str) -> Iterator[list[str]]:
    """`relora join` on this machine's loopback, told nothing but where to meet; afterwards what it said."""
    meeting = ["--rdzv-endpoint", endpoint, "--nnodes", "2", "--node-rank", "1", "--device", "cpu"]
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "relora_train.cli.app", "join", *meeting, "--wait-seconds", "3600"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as machine:
        try:
            yield said
            said.append(machine.communicate(timeout=300)[1])
        finally:
            machine.kill()
    assert machine.returncode == 0, said


def test_two_machines_give_the_bits_of_two_ranks_on_one_until_no_stage_is_left(
    dataset: Path, together: Path, tmp_path: Path
):
    """They meet for all stages with the same settings of ranks, and once more for others."""
    endpoint = f"127.0.0.1:{free_port()}"
    launch = {"nnodes": 2, "rdzv_endpoint": endpoint, "threads": 1, "device": "cpu"}
    pids: list[int] = []
    with machine_that_joins(endpoint) as said, closing(Worker(keeps=True)) as worker:
        for out, sharding in (("sharded", "full"), ("first", "none"), ("last", "none")):
            batch = {"batch": {"sequences": 8}} if sharding == "full" else {}  # it needs equal shares
            profile = profile_of(launch=launch | {"sharding": sharding}, **batch)
            request = stage_request(profile, "cycle-1", dataset, tmp_path / out)
            seen: list[Event] = []
            path = tmp_path / "request.json"
            worker.run("relora_train.training.trainer", request, path, on_event=seen.append, launch=profile.launch)
            assert seen[0]["ranks"] == 2 and seen[-1]["event"] == "stage_committed"
            pids.append(seen[0]["pid"])
        worker.dismiss(profile)
    assert "took part in 3 " in said[0] and pids[0] != pids[1] == pids[2], said
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (tmp_path / "last" / name).read_bytes() == (together / name).read_bytes(), name


def test_a_machine_that_joins_a_run_with_nothing_left_to_train_is_told_and_need_not_be_there(
    monkeypatch: pytest.MonkeyPatch,
):
    endpoint = f"127.0.0.1:{free_port()}"
    profile = profile_of(launch={"nnodes": 2, "rdzv_endpoint": endpoint, "threads": 1, "device": "cpu"})
    with machine_that_joins(endpoint) as said:
        Worker(keeps=True).dismiss(profile)
    assert "took part in 0 " in said[0]
    monkeypatch.setattr("relora_train.runs.workers._DISMISS_SECONDS", 1)
    Worker(keeps=True).dismiss(profile)
