"""The state inside a stage <-> a snapshot directory: only what moves. The manifest is written last.

Frozen weights are the parent checkpoint's (or follow from the seed), random numbers and data position from the step.
A stage that goes on from a snapshot gives, on a CPU, the bits that it would have given without a stop.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from relora_train.checkpoints.layout import snapshot_name
from relora_train.checkpoints.manifest import MANIFEST_NAME, ParentRef, SnapshotManifest, describe_files
from relora_train.distributed import local_shard, shard_of
from relora_train.errors import CheckpointCorruptError
from relora_train.settings.base import FrozenConfig
from relora_train.storage.durable import sync, write_durably
from relora_train.training.files import METRICS_FILE, LazyMapping, new_attempt, package_versions, write_metrics
from relora_train.training.optimizer import load_optimizer_state_by_name, optimizer_state_by_name
from relora_train.training.step import StageTraining
from relora_train.training.tensor_stream import TensorStream

TENSORS_FILE = "state.safetensors"
STATE_FILE = "snapshot.json"
_WEIGHT, _OPTIMIZER = "weight:", "optimizer:"


@dataclass
class Progress:
    """The state of a stage beside its weights and optimizer."""

    step: int
    """Updates done."""

    metrics: list[dict[str, Any]]
    """Records so far."""

    losses: Tensor
    """Float64 sum of the losses since the last record, on the training's device."""

    summed: int
    """Losses in that sum."""

    seconds: float
    """Spent on the stage, earlier attempts included."""


class SnapshotState(FrozenConfig):
    """The small part of a snapshot, beside its tensors and metrics."""

    fingerprint: str
    step: int = Field(ge=0)
    samples_seen: int = Field(ge=0)
    """Data position; follows from the step and is compared with it."""

    loss_sum: float
    summed: int = Field(ge=0)
    seconds: float = Field(ge=0)
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """The training state's."""


def moving_tensors(training: StageTraining) -> dict[str, Tensor]:
    """Return the trainable parameters and their Adam state, by name; the training's own tensors, not copies."""
    weights = {f"{_WEIGHT}{name}": p.detach() for name, p in training.model.named_parameters() if p.requires_grad}
    state = optimizer_state_by_name(training.optimizer, training.model)
    moments = {f"{_OPTIMIZER}{name}.{key}": value for name, entries in state.items() for key, value in entries.items()}
    return weights | moments


class HostBuffers:
    """Copies of tensors in this machine's memory, which is kept for the next copy: the only time training waits."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as they are now. The result lasts until the next call."""
        for name, tensor in tensors.items():
            if name not in self._kept:
                on_gpu = tensor.device.type == "cuda"
                self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            self._kept[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()  # else the thread would write memory that the copies have yet to fill
        return {name: self._kept[name] for name in tensors}


def write_snapshot(
    root: Path,
    *,
    run_id: str,
    stage: str,
    state: SnapshotState,
    tensors: Mapping[str, Tensor] | TensorStream,
    metrics: list[dict[str, Any]],
    parent: ParentRef | None = None,
) -> tuple[Path, SnapshotManifest]:
    """Commit a directory below `root`, on the disk when this returns. A crash on the way leaves no manifest."""
    attempt = new_attempt()
    directory = root / snapshot_name(state.step, attempt)
    directory.mkdir(parents=True)
    try:
        if isinstance(tensors, TensorStream):
            tensors.write(directory / TENSORS_FILE)
        else:
            save_file(dict(tensors), directory / TENSORS_FILE)
        (directory / STATE_FILE).write_text(state.model_dump_json(indent=1) + "\n")
        write_metrics(metrics, directory / METRICS_FILE)
        manifest = SnapshotManifest(
            files=describe_files(directory),
            attempt=attempt,
            versions=package_versions(),
            run_id=run_id,
            stage=stage,
            step=state.step,
            fingerprint=state.fingerprint,
            parent=parent,
        )
        for entry in manifest.files:
            sync(directory / entry.path)
        write_durably(directory / MANIFEST_NAME, manifest.to_bytes())
        sync(root)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)  # a full disk must not stay full of it
        raise
    return directory, manifest


def read_snapshot_state(directory: Path) -> SnapshotState:
    """Return the small part of a verified snapshot."""
    return SnapshotState.model_validate_json((directory / STATE_FILE).read_bytes())


def restore_snapshot(training: StageTraining, directory: Path) -> Progress:
    """Put the training where the snapshot was taken, all of it or an error. The directory is verified by the caller.

    Raises CheckpointCorruptError when the snapshot is of another stage or lacks a tensor.
    """
    state = read_snapshot_state(directory)
    expected = (training.request.fingerprint, training.samples_seen(state.step))
    if (state.fingerprint, state.samples_seen) != expected:
        raise _foreign(directory, f"stage {state.fingerprint[:12]} at sample {state.samples_seen}")
    saved: Any = safe_open(directory / TENSORS_FILE, framework="pt")
    shapes = {name: torch.Size(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118 (not a dict)
    weights = {name.removeprefix(_WEIGHT): shape for name, shape in shapes.items() if name.startswith(_WEIGHT)}
    trained = {name: p for name, p in training.model.named_parameters() if p.requires_grad}
    if weights != {name: p.shape for name, p in trained.items()}:
        raise _foreign(directory, f"a model with {len(weights)} trained tensors of other names or shapes")
    with torch.no_grad():
        for name, parameter in trained.items():
            local_shard(parameter).copy_(shard_of(saved.get_tensor(f"{_WEIGHT}{name}"), parameter))
    keys: dict[str, list[str]] = {}
    for entry in shapes:
        if entry.startswith(_OPTIMIZER):
            name, _, key = entry.removeprefix(_OPTIMIZER).rpartition(".")
            keys.setdefault(name, []).append(key)
    state_of = LazyMapping(
        keys, lambda name: {key: saved.get_tensor(f"{_OPTIMIZER}{name}.{key}") for key in keys[name]}
    )
    load_optimizer_state_by_name(training.optimizer, training.model, state_of)
    metrics = [json.loads(line) for line in (directory / METRICS_FILE).read_text().splitlines()]
    losses = torch.tensor(state.loss_sum, dtype=torch.float64, device=training.ranks.device)
    return Progress(state.step, metrics, losses, state.summed, state.seconds)


def _foreign(directory: Path, what: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"The snapshot {directory} is of {what}, not of this stage: it was copied or renamed. Delete it and run again."
    )
