"""A run's kind of dropout mask is settled once, recorded, and kept by all its stages wherever they are trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from stage_runs import CPU, stage_request, tiny_profile

from relora_train import devices
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import CheckpointManifest, ParentRef
from relora_train.checkpoints.run import CheckpointStore
from relora_train.method.layer import relora_layers
from relora_train.method.stages import Stage, fingerprint_settings, plan_stages, stage_fingerprint
from relora_train.runs.find import dropout_mask, find_stage, stage_identity
from relora_train.runs.run import Run
from relora_train.settings.method import DropoutMask
from relora_train.settings.profile import Profile, default_run_id
from relora_train.storage.opening import open_store
from relora_train.training.build import prepare_stage

DATASET = "d" * 64
GPU, ON_CPU = {"device": "cuda"}, {"device": "cpu"}


def run_of(tmp_path: Path, launch: dict[str, Any], **sections: Any) -> Run:
    return Run("masks", f"file://{tmp_path}/store", tiny_profile(launch=launch, **sections))


def commit(
    run: Run, stage: Stage, parent: CheckpointRef | None, *, recorded: DropoutMask | None, run_id: str = "masks"
) -> CheckpointRef:
    """The stage as a trainer with these masks leaves it; None: as one before there was a choice."""
    settings = fingerprint_settings(run.profile, stage, DATASET, dropout_mask=recorded)
    manifest = CheckpointManifest(
        files=(), attempt="a" * 16, run_id=run_id, profile="p", stage=stage.name, step=stage.end_step,
        cycle=stage.cycle, tokens_seen=0, dataset_id=DATASET, dataset_uri="memory://x/d",
        fingerprint=stage_fingerprint(settings, parent.fingerprint if parent else None), fingerprint_settings=settings,
        parent=ParentRef(uri=parent.uri, fingerprint=parent.fingerprint, step=parent.step) if parent else None,
        dropout_mask=recorded,
    )  # fmt: skip
    directory = Path(run.store_uri.removeprefix("file://")).parent / "empty"
    directory.mkdir(exist_ok=True)
    return CheckpointStore(open_store(run.store_uri), run_id).commit(directory, manifest)


@pytest.mark.parametrize(
    ("launch", "sections", "kind"),
    [
        (GPU, {}, "hash"),
        (GPU, {"method": "lora"}, "hash"),
        (ON_CPU | {"compile": True}, {}, "hash"),
        (ON_CPU, {}, "stream"),
        (GPU | {"compile": False}, {}, "stream"),
        (GPU, {"relora": {"dropout": 0.0}}, "stream"),
        (GPU, {"method": "full"}, "stream"),
        (GPU, {"relora": {"dropout_mask": "stream"}}, "stream"),
        (ON_CPU, {"relora": {"dropout_mask": "hash"}}, "hash"),
    ],
)
def test_a_run_that_compiles_and_drops_out_begins_with_hashed_masks(
    tmp_path: Path, launch: dict[str, Any], sections: dict[str, Any], kind: str
):
    assert dropout_mask(run_of(tmp_path, launch, **sections), None) == kind


def test_device_auto_looks_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_of(tmp_path, {"device": "auto"})
    monkeypatch.setattr(devices, "_DEVICE_FILES", tmp_path)
    monkeypatch.setattr(devices, "usable_gpus", lambda: 1)
    assert dropout_mask(run, None) == "stream"  # torch is not even asked
    (tmp_path / "nvidia0").touch()
    assert dropout_mask(run, None) == "hash"
    monkeypatch.setattr(devices, "usable_gpus", lambda: 0)
    assert dropout_mask(run, None) == "stream"


@pytest.mark.parametrize(("began", "goes_on"), [(GPU, ON_CPU), (ON_CPU, GPU)])
def test_later_stages_keep_the_kind_on_any_device(tmp_path: Path, began: dict[str, Any], goes_on: dict[str, Any]):
    first, later = run_of(tmp_path, began), run_of(tmp_path, goes_on)
    kind, parent = dropout_mask(first, None), None
    for stage in plan_stages(first.profile):
        parent = commit(first, stage, parent, recorded=kind)
        assert dropout_mask(later, parent) == kind
        assert stage_identity(later, stage, DATASET, parent) == stage_identity(first, stage, DATASET, parent)
    parent = None
    for stage in plan_stages(later.profile):  # the other machine finds all of them
        parent = find_stage(later, stage, parent, stage_identity(later, stage, DATASET, parent))
        assert parent is not None and parent.manifest.dropout_mask == kind


def test_a_run_from_before_there_was_a_choice_keeps_its_stream(tmp_path: Path):
    run = run_of(tmp_path, GPU)
    warm, first, second, *_ = plan_stages(run.profile)
    parent = commit(run, warm, None, recorded=None)
    assert dropout_mask(run, parent) == "hash"  # no mask has been drawn yet
    cycle = commit(run, first, parent, recorded=None)
    assert dropout_mask(run, cycle) == dropout_mask(run, parent) == "stream"
    assert "relora.dropout_mask" not in stage_identity(run, second, DATASET, cycle)[0]


def test_a_branch_from_a_full_rank_run_settles_its_own_and_finds_it_again(tmp_path: Path):
    on_gpu, on_cpu = run_of(tmp_path, GPU), run_of(tmp_path, ON_CPU)
    origin = commit(on_gpu, plan_stages(on_gpu.profile)[0], None, recorded=None, run_id="full")
    kind = dropout_mask(on_gpu, origin)
    commit(on_gpu, plan_stages(on_gpu.profile)[1], origin, recorded=kind)
    assert dropout_mask(on_cpu, origin) == kind == "hash"


def test_only_the_hash_changes_names_and_fingerprints():
    stage = plan_stages(Profile())[1]
    plain = fingerprint_settings(Profile(), stage, DATASET)
    for mask in (None, "stream"):
        assert fingerprint_settings(Profile(), stage, DATASET, dropout_mask=mask) == plain
    hashed = fingerprint_settings(Profile(), stage, DATASET, dropout_mask="hash")
    assert hashed == {**plain, "relora.dropout_mask": "hash"}
    explicit = Profile.model_validate({"relora": {"dropout_mask": "hash"}})
    assert fingerprint_settings(explicit, stage, DATASET) == hashed
    assert default_run_id(explicit) != default_run_id(Profile())
    warm = plan_stages(Profile())[0]
    assert fingerprint_settings(explicit, warm, DATASET) == fingerprint_settings(Profile(), warm, DATASET)


def test_masks_of_the_stream_are_drawn_by_eager_code_and_that_is_said(
    warm_start: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    request = stage_request(tiny_profile(launch={"compile": True}), "cycle-1", dataset, tmp_path / "c", warm_start)
    with caplog.at_level(logging.WARNING):
        training = prepare_stage(request, CPU)
    assert training.masks is None and training.products
    assert "cycle-1 is not compiled" in caplog.text


def test_hashed_masks_are_drawn_anew_for_each_micro_batch_and_are_a_function_of_the_step(
    warm_start: Path, dataset: Path, tmp_path: Path
):
    request = stage_request(tiny_profile(batch={"micro_sequences": 2}), "cycle-1", dataset, tmp_path / "c", warm_start)

    def seeds(steps: int) -> list[list[int]]:
        """Those of the first layer in each micro-batch of each of the steps."""
        training = prepare_stage(request.model_copy(update={"dropout_mask": "hash"}), CPU)
        layer, drawn = next(layer for _, layer in relora_layers(training.model)), []
        layer.register_forward_pre_hook(lambda *_: drawn.append(layer.mask_seed.tolist()))  # type: ignore[union-attr]
        for step in range(training.stage.first_step, training.stage.first_step + steps):
            training.update(step)
        return drawn

    long, short = seeds(2), seeds(1)
    assert len(long) == 2 * len(short) == len({tuple(seed) for seed in long})
    assert long[: len(short)] == short
