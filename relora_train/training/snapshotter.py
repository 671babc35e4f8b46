"""When a stage's state is saved, and on which thread: training waits for a copy in memory and for nothing else."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from relora_train.process import SNAPSHOT_THREAD, Emit
from relora_train.settings.running import SnapshotConfig
from relora_train.training.snapshot import (
    HostBuffers,
    Progress,
    SnapshotState,
    describe_progress,
    moving_tensors,
    write_snapshot,
)
from relora_train.training.step import StageTraining
from relora_train.training.tensor_stream import TensorStream


def is_due(settings: SnapshotConfig, *, step: int, seconds_since_last: float) -> bool:
    """Return True if a snapshot is wanted after update `step`."""
    by_steps = settings.every_steps is not None and step % settings.every_steps == 0
    return by_steps or (settings.every_seconds is not None and seconds_since_last >= settings.every_seconds)


class Snapshotter:
    """Saves the first rank's state below request.snapshots_directory; does nothing on other ranks or without one.

    At most one snapshot is being written at a time; one that is due meanwhile is left out. One that cannot be written
    (a full disk) is reported and training goes on. Every rank holds the same state, so no rank waits for another.
    """

    def __init__(self, training: StageTraining, emit: Emit) -> None:
        self._training, self._emit = training, emit
        self._root: Path | None = training.request.snapshots_directory if training.ranks.is_first else None
        self._buffers = HostBuffers()
        self._writer: threading.Thread | None = None
        self._last = time.monotonic()
        self._saved_step = -1

    def after_step(self, progress: Progress) -> None:
        """Begin a snapshot if one is due."""
        since = time.monotonic() - self._last
        if self._root is None or not is_due(
            self._training.profile.snapshots, step=progress.step, seconds_since_last=since
        ):
            return
        if self._writer is None or not self._writer.is_alive():
            work = self._copied(progress)
            if work is not None:
                self._writer = threading.Thread(target=self._write, args=work, name=SNAPSHOT_THREAD)
                self._writer.start()

    def at_stop(self, progress: Progress) -> bool:
        """Save this very step, unless that was done already; True when it is on the disk."""
        self.wait()
        if self._root is not None and self._saved_step != progress.step:
            work = self._copied(progress)
            if work is not None:
                self._write(*work)
        return self._saved_step == progress.step

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writer is not None:
            self._writer.join()

    def _copied(
        self, progress: Progress
    ) -> tuple[Path, SnapshotState, Mapping[str, Tensor], list[dict[str, Any]], float] | None:
        started = time.monotonic()
        if self._root is None or not math.isfinite(float(progress.losses)):  # diverged: the next record will say so
            return None
        tensors = self._buffers.copy(moving_tensors(self._training))
        state = describe_progress(self._training, progress)
        self._last = time.monotonic()
        return self._root, state, tensors, list(progress.metrics), self._last - started

    def _write(
        self,
        root: Path,
        state: SnapshotState,
        tensors: Mapping[str, Tensor],
        metrics: list[dict[str, Any]],
        stall_seconds: float,
    ) -> None:
        if write_and_report(self._training, self._emit, root, state, tensors, metrics, stall_seconds=stall_seconds):
            self._saved_step = state.step


def write_and_report(
    training: StageTraining,
    emit: Emit,
    root: Path,
    state: SnapshotState,
    tensors: Mapping[str, Tensor] | TensorStream,
    metrics: list[dict[str, Any]],
    *,
    stall_seconds: float | None = None,
) -> bool:
    """Commit a snapshot and return True, or report that it could not be written (a full disk, say).

    stall_seconds: how long training waited; None: for as long as the writing took.
    """
    request, stage, started = training.request, training.stage.name, time.monotonic()
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
        emit("snapshot_failed", stage=stage, step=state.step, message=f"{type(error).__name__}: {error}")
        return False
    seconds = time.monotonic() - started
    emit(
        "snapshot_committed",
        stage=stage,
        step=state.step,
        directory=str(directory),
        stall_seconds=seconds if stall_seconds is None else stall_seconds,
        write_seconds=seconds,
        size_bytes=manifest.size_bytes,
    )
    return True
