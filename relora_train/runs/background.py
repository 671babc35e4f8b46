"""Work beside a flow on a thread of its own, such as the upload of a stage's snapshots while it trains.

While the store cannot be reached, training goes on after one warning. The newest snapshots wait on this machine, the
oldest are dropped, and the store gets the newest first.
"""

import contextvars
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from relora_train.checkpoints.snapshots import SnapshotStore
from relora_train.errors import CheckpointError, ReLoRAError
from relora_train.events import Event

_log = logging.getLogger("relora_train.runs.background")

STOP_BUDGET_SECONDS = 28.0
"""From the moment the worker is asked to stop; Prefect kills everything after 30."""

TICK_SECONDS = 0.5
"""A wait on the flow's own thread is cut into these, so that a signal is answered on every platform."""

_UNTOLD_SECONDS = 25.0  # for a stop of which no trainer told; for a crash, whose retry on another machine needs it
_RETRY_SECONDS = (1.0, 5.0, 15.0, 60.0)
_HELD_BACK_SECONDS = 0.5  # between two questions whether snapshots may be stored by now


class Background:
    """The thread and its end. A subclass says in `_run` what it does; `_changed` guards what both threads use."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._closing = False
        """True: nothing more is offered, and the thread ends once it is through."""
        self._abandoned = False
        """True: nobody waits for the thread any more."""
        self._stopping_at = -math.inf
        run = contextvars.copy_context().run  # so that log records still belong to the flow around us
        self._thread = threading.Thread(target=run, args=(self._run,), name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def _run(self) -> None:
        raise NotImplementedError

    def stopping(self) -> None:
        """Note that the trainer is asked to stop: the time that is left counts from now."""
        self._stopping_at = time.monotonic()

    def _seconds_left(self) -> float:
        """Return how long a stop may still take. One of a minute ago was survived."""
        since = time.monotonic() - self._stopping_at
        return max(0.0, STOP_BUDGET_SECONDS - since) if since < 60.0 else _UNTOLD_SECONDS

    def _close(self, seconds: float | None) -> None:
        """Take nothing more, and wait so long for the thread to get through; None: until it is."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(TICK_SECONDS if seconds is None else seconds)
        while seconds is None and self._thread.is_alive():
            self._thread.join(TICK_SECONDS)


def pause_after(failures: int, pauses: Sequence[float]) -> float:
    """Return how long to wait after this many failures in a row: the last pause from then on."""
    return pauses[min(failures, len(pauses)) - 1]


class SnapshotUploader(Background):
    """Stores the snapshots that the events name and, at the end of the `with` block, the one that still waits.

    A block that ends well waits only for the upload that is under way: the checkpoint comes next. After an exception
    the newest snapshot is stored first. That takes 25 seconds at most, and ends within 28 seconds of the worker's stop.

    may_store: asked before each upload. While it says no, snapshots stay on this machine. After an exception that is no
    stop, nothing waits for them then: the retry on this machine needs no upload.
    """

    def __init__(
        self,
        snapshots: SnapshotStore,
        *,
        may_store: Callable[[], bool] = lambda: True,
        retry_seconds: tuple[float, ...] = _RETRY_SECONDS,
    ) -> None:
        super().__init__("snapshots")
        self._snapshots, self._may_store, self._retry_seconds = snapshots, may_store, retry_seconds
        self._pending: Path | None = None
        self._uploading: Path | None = None
        self._failures = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        flush = kind is not None and (not issubclass(kind, Exception) or self._may_store())
        with self._changed:
            if not flush:
                self._pending = None
        self._close(self._seconds_left())
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
            if flush and self._pending is not None:
                _log.warning(
                    "The last snapshot could not be stored in %s in time. It waits in %s: the same command on this "
                    "machine goes on from it.",
                    self._snapshots.uri, self._pending,
                )  # fmt: skip

    def hear(self, event: Event) -> None:
        """Take from a worker's events what concerns snapshots."""
        if event["event"] == "snapshot_committed":
            self.offer(Path(event["directory"]))
        elif event["event"] == "stopping":
            self.stopping()
        elif event["event"] == "snapshot_failed":
            _log.warning("The snapshot of step %s was not written: %s", event["step"], event["message"])

    def offer(self, directory: Path) -> None:
        """Store this snapshot next, instead of one that is still waiting. Returns at once."""
        with self._changed:
            self._pending = directory
            self._snapshots.prune_local(in_use=self._uploading)
            self._changed.notify_all()

    def _run(self) -> None:
        while (directory := self._next()) is not None:
            problem: Exception | None = None
            try:
                self._snapshots.upload(directory)
            except (CheckpointError, FileNotFoundError) as error:  # dropped, or damaged on this disk: the next will do
                _log.debug("Snapshot %s was not stored: %s", directory, error)
            except (ReLoRAError, OSError) as error:
                problem = error
            with self._changed:
                self._uploading = None
                if problem is not None:
                    self._fail(directory, problem)
                    continue
                if self._failures:
                    _log.info("Snapshots are stored again.")
                self._failures = 0
                if self._pending == directory:
                    self._pending = None

    def _next(self) -> Path | None:
        """Wait for a snapshot and return it; None when there will be no more."""
        with self._changed:
            while not self._abandoned and not (self._closing and self._pending is None):
                held_back = self._pending is not None and not self._may_store()
                if self._pending is not None and not held_back:
                    break
                self._changed.wait(_HELD_BACK_SECONDS if held_back else None)
            self._uploading = None if self._abandoned else self._pending
            return self._uploading

    def _fail(self, tried: Path, error: Exception) -> None:
        """Tell of the first failure, then pause until the next attempt; a newer snapshot or the end cuts it short."""
        self._failures += 1
        if self._failures == 1:
            _log.warning(
                "Snapshots cannot be stored in %s. Training goes on; the newest wait on this machine and are stored "
                "when it works again. (%s)",
                self._snapshots.uri, error,
            )  # fmt: skip
        pause = pause_after(self._failures, self._retry_seconds)
        if self._closing:
            self._changed.wait_for(lambda: self._abandoned, timeout=min(pause, self._retry_seconds[0]))
        else:
            self._changed.wait_for(lambda: self._closing or self._pending != tried, timeout=pause)
