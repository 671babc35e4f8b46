"""The state inside a stage <-> a snapshot directory: only what moves. The manifest is written last.

Frozen weights are the parent checkpoint's (or follow from the seed), random numbers and data position from the step.
A stage that goes on from a snapshot gives, on a CPU, the bits that it would have given without a stop. Training waits
for a copy in memory, and a thread writes it.
"""

import json
import math
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from relora_train.checkpoints.layout import snapshot_name
from relora_train.checkpoints.manifest import MANIFEST_NAME, SnapshotManifest, describe_files
from relora_train.distributed import SLOW, gather_on_first, local_shard, second_group, shard_of
from relora_train.errors import CheckpointCorruptError
from relora_train.process import SNAPSHOT_THREAD, Emit
from relora_train.settings.base import FrozenConfig
from relora_train.settings.running import SnapshotConfig
from relora_train.storage.durable import sync, write_durably
from relora_train.training.files import METRICS_FILE, LazyMapping, new_attempt, package_versions, write_metrics
from relora_train.training.optimizer import load_optimizer_state_by_name, optimizer_state_by_name
from relora_train.training.requests import StageRequest
from relora_train.training.step import StageTraining
from relora_train.training.tensor_stream import Layout, TensorStream

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
    state = optimizer_state_by_name(training.optimizer, training.model, as_held=True)
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
    request: StageRequest,
    state: SnapshotState,
    tensors: TensorStream,
    metrics: list[dict[str, Any]],
) -> tuple[Path, SnapshotManifest]:
    """Commit a directory below `root`, on the disk when this returns. A crash on the way leaves no manifest."""
    attempt = new_attempt()
    directory = root / snapshot_name(state.step, attempt)
    directory.mkdir(parents=True)
    try:
        tensors.write(directory / TENSORS_FILE)
        (directory / STATE_FILE).write_text(state.model_dump_json(indent=1) + "\n")
        write_metrics(metrics, directory / METRICS_FILE)
        manifest = SnapshotManifest(
            files=describe_files(directory),
            attempt=attempt,
            versions=package_versions(),
            run_id=request.run_id,
            stage=request.stage.name,
            step=state.step,
            fingerprint=state.fingerprint,
            parent=request.parent,
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


def is_due(settings: SnapshotConfig, *, step: int, seconds_since_last: float) -> bool:
    """Return True if a snapshot is wanted after update `step`."""
    by_steps = settings.every_steps is not None and step % settings.every_steps == 0
    return by_steps or (settings.every_seconds is not None and seconds_since_last >= settings.every_seconds)


class Snapshotter:
    """Saves a stage's state below request.snapshots_directory; does nothing without one.

    Each rank that takes part copies what it holds, and training goes on. One thread a rank does the rest, one snapshot
    at a time; one that is due meanwhile is left out. Ranks that hold a whole model hold the same state: the first alone
    takes part. Ranks that share a model all do, together: the others send their rows to the first, which writes whole
    tensors. They do so in a gloo group of their own, where no message of the training can get between.
    A snapshot that cannot be written (a full disk) is reported and training goes on.
    """

    def __init__(self, training: StageTraining, emit: Emit) -> None:
        self._training, self._ranks, self._emit = training, training.ranks, emit
        takes_part = self._ranks.is_first or self._ranks.sharded
        self._root: Path | None = training.request.snapshots_directory if takes_part else None
        self._group: Any = None
        if self._root is not None and self._ranks.sharded:
            self._group = second_group()
        self._buffers = HostBuffers()
        self._writer: threading.Thread | None = None
        self._last = time.monotonic()
        self._saved_step = -1

    def after_step(self, progress: Progress) -> None:
        """Begin a snapshot if one is due and none is being written."""
        if self._root is None:
            return
        since = time.monotonic() - self._last
        due = is_due(self._training.profile.snapshots, step=progress.step, seconds_since_last=since)
        due = self._any(self._ranks.is_first and due)  # by the first one's clock, or ranks would part
        if due and not self._any(self._writer is not None and self._writer.is_alive()):
            self._save(self._root, progress, wait=False)

    def at_stop(self, progress: Progress) -> bool:
        """Save this very step, unless that was done already; True, on the first rank, when it is on the disk."""
        self._ranks.expect_answers_within(SLOW)
        self.wait()
        if self._root is not None and not self._any(self._saved_step == progress.step):
            self._save(self._root, progress, wait=True)
        return self._saved_step == progress.step

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._writer is not None:
            self._writer.join()

    def _any(self, flag: bool) -> bool:
        """Return True if the flag is set on a rank that takes part."""
        return self._ranks.any(flag) if self._ranks.sharded else flag

    def _save(self, root: Path, progress: Progress, *, wait: bool) -> None:
        started = self._last = time.monotonic()
        if not math.isfinite(float(progress.losses)):  # diverged: the next record will say so. The same on all ranks
            return
        tensors = moving_tensors(self._training)
        state = SnapshotState(
            fingerprint=self._training.request.fingerprint,
            step=progress.step,
            samples_seen=self._training.samples_seen(progress.step),
            loss_sum=float(progress.losses),
            summed=progress.summed,
            seconds=progress.seconds,
            matmul_precision=self._training.matmul,
        )
        metrics = list(progress.metrics)
        copies = self._buffers.copy({name: local_shard(tensor) for name, tensor in tensors.items()})
        layout: Layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        whole = (gather_on_first(copies[name], tensor, self._group) for name, tensor in tensors.items())
        self._last = time.monotonic()
        work = (root, state, TensorStream(layout, whole), metrics, self._last - started)
        if wait:
            self._write(*work)
        else:
            self._writer = threading.Thread(target=self._write, args=work, name=SNAPSHOT_THREAD)
            self._writer.start()

    def _write(
        self,
        root: Path,
        state: SnapshotState,
        tensors: TensorStream,
        metrics: list[dict[str, Any]],
        stall_seconds: float,
    ) -> None:
        """Commit a snapshot and report it, or lend rows to the first rank. stall_seconds: training's wait."""
        stage, started = self._training.stage.name, time.monotonic()
        if not self._ranks.is_first:
            with suppress(RuntimeError):  # a rank that is lost is the training's to report
                tensors.finish()
            return
        try:
            directory, manifest = write_snapshot(root, self._training.request, state, tensors, metrics)
        except Exception as error:
            self._emit("snapshot_failed", stage=stage, step=state.step, message=f"{type(error).__name__}: {error}")
            with suppress(RuntimeError):
                tensors.finish()  # what a full disk left over: the other ranks are at it
            return
        self._emit(
            "snapshot_committed",
            stage=stage,
            step=state.step,
            directory=str(directory),
            stall_seconds=stall_seconds,
            write_seconds=time.monotonic() - started,
            size_bytes=manifest.size_bytes,
        )
        self._saved_step = state.step
