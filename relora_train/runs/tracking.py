"""Tell trackers what a flow's events say, as the profile's [tracking] asks: never a reason to fail or to wait.

A bounded queue and a thread of its own feed a process with the trackers' clients (trackers.py). What does not fit in
the queue is left out.
"""

import logging
import queue
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from relora_train import events
from relora_train.errors import ConfigError
from relora_train.events import Event
from relora_train.runs.background import Background
from relora_train.runs.reporting import Listener
from relora_train.runs.trackers import Point, Start
from relora_train.runs.worker_process import WorkerProcess
from relora_train.settings.profile import Profile
from relora_train.storage.workspace import cache_root

_QUEUED = 2_000
_END_SECONDS = 10.0
"""The time for which the end of a flow waits for its trackers."""
_END_SECONDS_WHEN_STOPPED = 5.0
_LEFT_OUT = {"event", "stage", "step", "start_step", "end_step", "eta_seconds", "when", "cycle", "samples", "reused"}
_log = logging.getLogger(__name__)


def check_trackers(profile: Profile) -> None:
    """Refuse trackers whose client is not installed here."""
    for name in profile.tracking.to:
        if find_spec(name) is None:
            raise ConfigError(
                f"tracking.to names {name!r}, which is not installed here. Install it with "
                f"`pip install 'relora-train[{name}]'`, or leave it out."
            )


class Tracking(Background):
    """Tells the trackers of a run's profile for the length of a `with` block; without any it does nothing."""

    def __init__(self, run_id: str, profile: Profile) -> None:
        super().__init__("tracking")
        self._start: Start | None = None
        if (settings := profile.tracking).to:
            directory = Path(settings.directory).expanduser() if settings.directory else cache_root() / "tracking"
            self._start = Start(
                run_id=run_id,
                project=settings.project,
                trackers=settings.to,
                directory=directory.absolute(),
                settings=profile.model_dump(mode="json", exclude={"tracking"}),
            )
        self._points: queue.Queue[Point | None] = queue.Queue(_QUEUED)
        self._reader, self._listener = EventReader(), Listener(self._hear)
        self._process: WorkerProcess | None = None

    def __enter__(self) -> Self:
        if self._start is None:
            return self
        events.listen(self._listener)
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._start is None:
            return
        events.unlisten(self._listener)
        self._offer([None])
        stopped = error is not None and not isinstance(error, Exception)
        self._close(_END_SECONDS_WHEN_STOPPED if stopped else _END_SECONDS)
        if self._thread.is_alive() and self._process is not None:
            _log.warning("Trackers took too long to end: they may not show the last of this run.")
            self._process.kill()  # also frees a thread that waits for its input to be read

    def _hear(self, event: Event) -> None:
        self._offer(self._reader.points(event))

    def _offer(self, points: Sequence[Point | None] | Iterator[Point]) -> None:
        for point in points:
            try:
                self._points.put_nowait(point)
            except queue.Full:
                if point is None:
                    self._points.get_nowait()
                    self._points.put_nowait(None)

    def _run(self) -> None:
        module = "relora_train.runs.trackers"
        try:
            process = self._process = WorkerProcess(module, [sys.executable, "-m", module], keep=("WANDB_API_KEY",))
        except OSError as error:
            _log.warning("Trackers are not told of this run: %s", error)
            return
        try:
            if self._start is not None:
                process.send(self._start.model_dump_json())
            while (point := self._points.get()) is not None:
                process.send(point.model_dump_json())
        finally:
            process.close(seconds=2 * _END_SECONDS)


class EventReader:
    """Turns events into points. Steps never go back: what is told late counts at the latest step."""

    def __init__(self) -> None:
        self._step, self._loss = 0, 0.0

    def points(self, event: Event) -> Iterator[Point]:
        """Yield what an event says to trackers."""
        name, stage = event["event"], str(event.get("stage", ""))
        numbers = {
            key: float(value)
            for key, value in event.items()
            if key not in _LEFT_OUT and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if name == "stage_started":
            self._step = event["start_step"]
            text = f"{stage}: steps {event['start_step'] + 1} to {event['end_step']}"
            yield self._point("stage", {}, {f"stages/{stage}": text}, pid=event.get("pid"))
        elif name == "progress":
            self._step = event["step"]
            if numbers["loss"] != self._loss:  # the latest loss is told until there is a newer one
                self._loss = numbers["loss"]
                yield self._point("train", numbers)
        elif name == "evaluation" and (event.get("when"), event.get("step")) in (("after", self._step), ("before", 0)):
            yield self._point("evaluation", numbers)  # before a later stage it is what it was after the last one
        elif name == "merge":
            yield self._point("merge", numbers)
        elif name == "evaluated":
            samples = "\n\n".join(f"{one['prompt']}{one['text']}" for one in event.get("samples", ()))
            yield self._point(f"checkpoints/{stage}", numbers, {f"samples/{stage}": samples} if samples else {})
        elif name in ("diverged", "retrying", "resumed"):
            yield self._point("stage", {}, {f"events/{name}": str(event.get("message", stage))})

    def _point(
        self, group: str, numbers: dict[str, float], texts: dict[str, str] | None = None, pid: Any = None
    ) -> Point:
        named = {f"{group}/{key}": value for key, value in numbers.items()}
        return Point(step=self._step, numbers=named, texts=texts or {}, pid=pid)
