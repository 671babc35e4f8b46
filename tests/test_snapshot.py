"""A stage that was stopped anywhere and went on from its snapshot is the stage that was never stopped, bit for bit."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from stage_runs import ignore, metrics_of, run_all, stage_request, tiny_profile

from relora_train.checkpoints.manifest import SnapshotManifest, parse_manifest
from relora_train.checkpoints.snapshots import local_snapshots
from relora_train.errors import CheckpointCorruptError, TrainerInterruptedError
from relora_train.settings.profile import Profile
from relora_train.settings.running import SnapshotConfig
from relora_train.training import snapshot
from relora_train.training.requests import StageRequest
from relora_train.training.snapshot import is_due
from relora_train.training.step import StageTraining
from relora_train.training.tensor_stream import TensorStream
from relora_train.training.trainer import run_stage

TIMING = ("seconds", "tokens_per_second", "data_wait_share")
HARD: dict[str, Any] = {"batch": {"micro_sequences": 2}, "relora": {"dropout": 0.3}}
"""Gradient accumulation and dropout."""

KINDS = {
    "relora": tiny_profile(**HARD),
    "relora, bfloat16": tiny_profile(precision={"dtype": "bfloat16"}, **HARD),
    "relora, pure bfloat16": tiny_profile(precision={"dtype": "pure-bfloat16"}, **HARD),
    "relora, zero reset": tiny_profile(optimizer_reset={"mode": "zero"}, schedule={"warm_start_steps": 0}),
    "relora, weight decay": tiny_profile(optimizer={"weight_decay": 0.1}, **HARD),
    "relora, growing": tiny_profile(schedule={"cycle_growth": 2.0, "restart_warmup_steps": 4}, **HARD),
    "lora": tiny_profile(method="lora", **HARD),
    "full": tiny_profile(method="full", optimizer={"weight_decay": 0.1}),
}


class Undisturbed(dict[str, dict[str, Path]]):
    """For every kind that is asked for, the checkpoints of a run that nothing stopped."""

    def __init__(self, dataset: Path, output: pytest.TempPathFactory) -> None:
        super().__init__()
        self.dataset, self.output = dataset, output

    def __missing__(self, kind: str) -> dict[str, Path]:
        self[kind] = run_all(KINDS[kind], self.dataset, self.output.mktemp("run"))
        return self[kind]


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(dataset, tmp_path_factory)


class StopsAfter:
    """Sends this process SIGTERM during the given updates."""

    def __init__(self, patch: pytest.MonkeyPatch, *steps: int) -> None:
        update = StageTraining.update

        def update_and_stop(training: StageTraining, step: int) -> Any:
            if step in steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(training, step)

        patch.setattr(StageTraining, "update", update_and_stop)


def newest(directory: Path) -> Path:
    return directory / max(local_snapshots(directory))


def run_with_stops(request: StageRequest, stops: list[int], snapshots: Path) -> None:
    """Run a stage to its end, stopped after each of these steps and continued from the snapshot."""
    with pytest.MonkeyPatch.context() as patch:
        StopsAfter(patch, *stops)
        request = request.model_copy(update={"snapshots_directory": snapshots})
        for step in stops:
            with pytest.raises(TrainerInterruptedError, match=rf"stopped by SIGTERM at step {step} .* saved"):
                run_stage(request, ignore)
            assert not request.output_directory.exists()
            request = request.model_copy(update={"snapshot_directory": newest(snapshots)})
        run_stage(request, ignore)


def untimed(checkpoint: Path) -> list[dict[str, Any]]:
    kinds = ("train", "evaluation", "merge")
    records = [record for kind in kinds for record in metrics_of(checkpoint, kind)]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def assert_same_stage(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert untimed(one) == untimed(other)


STAGES = [
    ("relora", "warm-start"),
    ("relora", "cycle-1"),
    ("relora", "cycle-2"),
    ("relora, bfloat16", "cycle-2"),
    ("relora, pure bfloat16", "warm-start"),
    ("relora, pure bfloat16", "cycle-2"),
    ("relora, zero reset", "cycle-1"),
    ("relora, zero reset", "cycle-2"),
    ("relora, weight decay", "cycle-2"),
    ("relora, growing", "cycle-2"),
    ("lora", "lora"),
    ("full", "full-2"),
]


def resumed_request(kind: str, stage: str, dataset: Path, undisturbed: Undisturbed, output: Path) -> StageRequest:
    names = list(undisturbed[kind])
    before = names.index(stage) - 1
    parent = undisturbed[kind][names[before]] if before >= 0 else None
    return stage_request(KINDS[kind], stage, dataset, output, parent)


def steps_of(kind: str, stage: str, dataset: Path, undisturbed: Undisturbed) -> range:
    records = metrics_of(undisturbed[kind][stage])
    return range(records[0]["step"], records[-1]["step"] + 1)


@pytest.mark.parametrize(("kind", "stage"), STAGES)
def test_a_stage_stopped_twice_and_continued_is_the_stage_never_stopped(
    kind: str, stage: str, dataset: Path, undisturbed: Undisturbed, tmp_path: Path
):
    first, *_, last = steps_of(kind, stage, dataset, undisturbed)
    request = resumed_request(kind, stage, dataset, undisturbed, tmp_path / "out")
    run_with_stops(request, [first + 1, last - 2], tmp_path / "snapshots")
    assert_same_stage(tmp_path / "out", undisturbed[kind][stage])


@pytest.mark.parametrize("step", range(7, 15))
def test_a_cycle_may_be_stopped_after_any_step_also_its_first_and_its_last(
    step: int, dataset: Path, undisturbed: Undisturbed, tmp_path: Path
):
    request = resumed_request("relora", "cycle-1", dataset, undisturbed, tmp_path / "out")
    run_with_stops(request, [step], tmp_path / "snapshots")
    assert_same_stage(tmp_path / "out", undisturbed["relora"]["cycle-1"])


def test_a_run_stopped_in_every_stage_ends_with_the_same_bits(dataset: Path, undisturbed: Undisturbed, tmp_path: Path):
    """Across merges: every stage starts from what a continued one committed."""
    parent = None
    for stage, step in (("warm-start", 4), ("cycle-1", 9), ("cycle-2", 20)):
        request = stage_request(KINDS["relora"], stage, dataset, tmp_path / stage, parent)
        run_with_stops(request, [step], tmp_path / f"snapshots-{stage}")
        parent = request.output_directory
    assert_same_stage(tmp_path / "cycle-2", undisturbed["relora"]["cycle-2"])


def with_snapshots(profile: Profile, **settings: Any) -> Profile:
    return profile.model_copy(update={"snapshots": SnapshotConfig(**settings)})


def test_taking_snapshots_changes_nothing_and_each_holds_only_what_moves(
    dataset: Path, undisturbed: Undisturbed, tmp_path: Path
):
    request = resumed_request("relora", "cycle-1", dataset, undisturbed, tmp_path / "out")
    request = request.model_copy(
        update={
            "snapshots_directory": tmp_path / "snapshots",
            "profile": with_snapshots(KINDS["relora"], every_steps=3, every_seconds=None),
        }
    )
    seen: list[dict[str, Any]] = []
    run_stage(request, lambda event, **fields: seen.append({"event": event, **fields}))
    assert_same_stage(tmp_path / "out", undisturbed["relora"]["cycle-1"])
    taken = [event for event in seen if event["event"] == "snapshot_committed"]
    assert taken and {event["step"] for event in taken} <= {9, 12}  # one that is due during another is left out
    directory = Path(taken[0]["directory"])
    manifest = parse_manifest(SnapshotManifest, (directory / "manifest.json").read_bytes(), uri=str(directory))
    assert (manifest.stage, manifest.step) == ("cycle-1", taken[0]["step"])
    assert manifest.size_bytes == taken[0]["size_bytes"]
    names = set(load_file(directory / "state.safetensors"))
    assert "weight:model.layers.0.mlp.up_proj.lora_A" in names and "weight:model.embed_tokens.weight" in names
    assert "weight:model.layers.0.mlp.up_proj.weight" not in names
    assert "optimizer:model.layers.0.mlp.up_proj.lora_A.exp_avg" in names, "as snapshots in the stores have it"


def test_a_snapshot_taken_while_training_continues_to_the_same_bits(
    dataset: Path, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is written by the thread is the state at its step, although training goes on."""
    profile = with_snapshots(KINDS["relora"], every_steps=3, every_seconds=None)
    changes = {"snapshots_directory": tmp_path / "snapshots", "profile": profile}
    request = resumed_request("relora", "cycle-1", dataset, undisturbed, tmp_path / "out").model_copy(update=changes)
    run_stage(request, ignore)
    for name in local_snapshots(tmp_path / "snapshots"):
        again = request.model_copy(
            update={"output_directory": tmp_path / name, "snapshot_directory": tmp_path / "snapshots" / name}
        )
        run_stage(again, ignore)
        assert_same_stage(tmp_path / name, undisturbed["relora"]["cycle-1"])


@pytest.mark.parametrize("crash_at", ["tensors", "manifest"])
def test_a_crash_before_the_manifest_leaves_no_snapshot(
    crash_at: str,
    dataset: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    place, name = {"tensors": (TensorStream, "write"), "manifest": (snapshot, "write_durably")}[crash_at]

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, name, fail)
    profile = with_snapshots(KINDS["relora"], every_steps=3)
    changes = {"snapshots_directory": tmp_path / "snapshots", "profile": profile}
    request = resumed_request("relora", "cycle-1", dataset, undisturbed, tmp_path / "out").model_copy(update=changes)
    seen: list[dict[str, Any]] = []
    run_stage(request, lambda event, **fields: seen.append({"event": event, **fields}))
    failed = [event for event in seen if event["event"] == "snapshot_failed"]
    assert failed and "No space left" in failed[0]["message"]
    assert local_snapshots(tmp_path / "snapshots") == []
    assert_same_stage(tmp_path / "out", undisturbed["relora"]["cycle-1"])  # training went on


def test_a_snapshot_of_another_stage_or_model_is_refused(dataset: Path, undisturbed: Undisturbed, tmp_path: Path):
    request = resumed_request("relora", "cycle-1", dataset, undisturbed, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainerInterruptedError):
        StopsAfter(patch, 8)
        run_stage(request.model_copy(update={"snapshots_directory": tmp_path / "snapshots"}), ignore)
    other = resumed_request("relora", "cycle-2", dataset, undisturbed, tmp_path / "out")
    with pytest.raises(CheckpointCorruptError, match=r"is of stage [0-9a-f]{12} at sample \d+, not of this stage"):
        run_stage(other.model_copy(update={"snapshot_directory": newest(tmp_path / "snapshots")}), ignore)
    tensors = load_file(newest(tmp_path / "snapshots") / "state.safetensors")
    del tensors["weight:model.embed_tokens.weight"]
    save_file(tensors, newest(tmp_path / "snapshots") / "state.safetensors")
    with pytest.raises(CheckpointCorruptError, match="trained tensors of other names or shapes, not of this stage"):
        run_stage(request.model_copy(update={"snapshot_directory": newest(tmp_path / "snapshots")}), ignore)


def test_a_diverged_state_is_never_saved(
    dataset: Path, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    update = StageTraining.update
    monkeypatch.setattr(
        StageTraining, "update", lambda self, step: (update(self, step)[0] * float("nan"), torch.tensor(0.0))
    )
    monkeypatch.setattr(snapshot, "is_due", lambda *_, **__: True)
    profile = tiny_profile(logging={"every_steps": 100})
    request = stage_request(profile, "warm-start", dataset, tmp_path / "out")
    monkeypatch.setattr("relora_train.training.trainer._FIRST_STEPS", 0)
    with pytest.raises(Exception, match="diverged"):
        run_stage(request.model_copy(update={"snapshots_directory": tmp_path / "snapshots"}), ignore)
    assert not (tmp_path / "snapshots").exists()


@pytest.mark.parametrize("name", ["step", "samples_seen", "summed", "seconds"])
def test_what_a_snapshot_counts_is_there_and_not_negative(name: str):
    counted = {"step": 0, "samples_seen": 0, "summed": 0, "seconds": 0.0}
    state = {"fingerprint": "f", "loss_sum": -1.0}
    assert snapshot.SnapshotState.model_validate(state | counted).matmul_precision is None
    for wrong in (state | counted | {name: -1}, {k: v for k, v in (state | counted).items() if k != name}):
        with pytest.raises(ValidationError, match=name):
            snapshot.SnapshotState.model_validate(wrong)


@given(st.integers(1, 10_000), st.none() | st.integers(1, 50), st.none() | st.floats(1, 1e6), st.floats(0, 2e6))
def test_a_snapshot_is_due_every_so_many_steps_or_seconds_whichever_comes_first(step, steps, seconds, since):
    settings = SnapshotConfig(every_steps=steps, every_seconds=seconds)
    by_steps = steps is not None and step % steps == 0
    by_seconds = seconds is not None and since >= seconds
    assert is_due(settings, step=step, seconds_since_last=since) == (by_steps or by_seconds)
