"""When a stage's state is saved, and on which thread: training waits for a copy in memory and for nothing else."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from relora_train.distributed import SLOW, STEP, full_tensor
from relora_train.process import SNAPSHOT_THREAD, Emit
from relora_train.settings.running import SnapshotConfig
from relora_train.training.snapshot import HostBuffers, Progress, SnapshotState, moving_tensors, write_snapshot
from relora_train.training.step import StageTraining
from relora_train.training.tensor_stream import Layout, TensorStream


def is_due(settings: SnapshotConfig, *, step: int, seconds_since_last: float) -> bool:
    """Return True if a snapshot is wanted after update `step`."""
    by_steps = settings.every_steps is not None and step % settings.every_steps == 0
    return by_steps or (settings.every_seconds is not None and seconds_since_last >= settings.every_seconds)


class Snapshotter:
    """Saves a stage's state below request.snapshots_directory; does nothing without one.

    Ranks that hold a whole model hold the same state: the first saves, and no rank waits for another. It writes on a
    thread, one snapshot at a time; one that is due meanwhile is left out. The ranks of a sharded model save together:
    all gather one tensor after another, the first writes, and training waits until the file is written.
    A snapshot that cannot be written (a full disk) is reported and training goes on.
    """

    def __init__(self, training: StageTraining, emit: Emit) -> None:
        self._training, self._ranks, self._emit = training, training.ranks, emit
        takes_part = self._ranks.is_first or self._ranks.sharded
        self._root: Path | None = training.request.snapshots_directory if takes_part else None
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
        if self._ranks.sharded:
            due = self._ranks.any(self._ranks.is_first and due)  # by the first one's clock, or ranks would part
        if due and (self._writer is None or not self._writer.is_alive()):
            self._save(self._root, progress, wait=False)

    def at_stop(self, progress: Progress) -> bool:
        """Save this very step, unless that was done already; True, on the first rank, when it is on the disk."""
        self.wait()
        saved = self._saved_step == progress.step
        if self._root is not None and not (self._ranks.any(saved) if self._ranks.sharded else saved):
            self._save(self._root, progress, wait=True)
        return self._saved_step == progress.step

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._writer is not None:
            self._writer.join()

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
        if self._ranks.sharded:
            layout: Layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            stream = TensorStream(layout, (full_tensor(tensor) for tensor in tensors.values()))
            self._ranks.expect_answers_within(SLOW)
            if self._ranks.is_first:
                self._write(root, state, stream, metrics, None)
            stream.finish()  # also what a full disk left over: the other ranks are at it
            self._ranks.barrier()  # the file is on the disk
            self._ranks.expect_answers_within(STEP)
            return
        copies = self._buffers.copy(tensors)
        self._last = time.monotonic()
        work = (root, state, copies, metrics, self._last - started)
        if wait:
            self._write(*work)
        else:
            self._writer = threading.Thread(target=self._write, args=work, name=SNAPSHOT_THREAD)
            self._writer.start()

    def _write(
        self,
        root: Path,
        state: SnapshotState,
        tensors: Mapping[str, Tensor] | TensorStream,
        metrics: list[dict[str, Any]],
        stall_seconds: float | None,
    ) -> None:
        """Commit a snapshot and report it. stall_seconds: training's wait; None for as long as the writing took."""
        request, started = self._training.request, time.monotonic()
        stage = request.stage.name
        try:
            directory, manifest = write_snapshot(
                root,
                run_id=request.run_id,
                stage=stage,
                state=state,
                tensors=tensors,
                metrics=metrics,
                parent=request.parent,
            )
        except Exception as error:
            self._emit("snapshot_failed", stage=stage, step=state.step, message=f"{type(error).__name__}: {error}")
            return
        seconds = time.monotonic() - started
        self._emit(
            "snapshot_committed",
            stage=stage,
            step=state.step,
            directory=str(directory),
            stall_seconds=seconds if stall_seconds is None else stall_seconds,
            write_seconds=seconds,
            size_bytes=manifest.size_bytes,
        )
        self._saved_step = state.step
