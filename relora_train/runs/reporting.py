"""Write the status of a run into its store while its flow works: how far it is, its metrics, how it ended.

Best effort, on a thread of its own: a store that refuses or hangs costs a warning and a few seconds at the end.
"""

import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from relora_train import events
from relora_train.checkpoints.status import RunStatus, read_status, status_key
from relora_train.errors import DivergedError, ReLoRAError, RunInUseError, TrainerInterruptedError
from relora_train.events import Event
from relora_train.method.stages import Stage
from relora_train.runs.background import Background
from relora_train.storage.base import ObjectStore
from relora_train.storage.redaction import masked

REPORT_SECONDS = 15.0
"""Between two writes of the same stage's progress."""

MAX_RECORDS = 400
"""Records kept of a stage; of more, every second one is dropped."""

_WAIT_SECONDS = 5.0
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Listener(logging.Handler):
    """Passes the events of this process to a function. What goes wrong in it is dropped: the work goes on."""

    def __init__(self, hear: Callable[[Event], None]) -> None:
        super().__init__()
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if event := getattr(record, "event", None):
                self._hear(event)
        except Exception:
            _log.debug("An event was not understood.", exc_info=True)


class RunReporter(Background):
    """Keeps status.json of a run up to date for the length of a `with` block.

    still_ours: asked before each write; what it raises ends the writing.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        profile: str,
        stages: Sequence[Stage],
        *,
        still_ours: Callable[[], None] = lambda: None,
        every_seconds: float = REPORT_SECONDS,
    ) -> None:
        super().__init__("status")
        self._store, self._run_id, self._still_ours, self._every_seconds = store, run_id, still_ours, every_seconds
        self._status = RunStatus(
            state="running", profile=profile, stages={stage.name: stage.end_step for stage in stages}
        )
        self._records: dict[str, list[dict[str, Any]]] = {}
        self._earlier: dict[str, list[dict[str, Any]]] = {}
        """Records of an earlier attempt at a stage, of which those before a snapshot go on to count."""
        self._urgent = self._dirty = True
        self._failed = False
        self._listener = Listener(self._hear)

    def __enter__(self) -> Self:
        before = self._tried(lambda: read_status(self._store, self._run_id))
        for record in before.records if before else ():
            self._records.setdefault(str(record.get("stage")), []).append(record)
        events.listen(self._listener)
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        events.unlisten(self._listener)
        with self._changed:
            self._status = self._status.model_copy(update=end_of(error))
            self._dirty = not isinstance(error, RunInUseError)  # then the status is its successor's
        self._close(_WAIT_SECONDS)

    def _hear(self, event: Event) -> None:
        name, stage = str(event["event"]), str(event.get("stage", ""))
        changes: dict[str, Any] = {"state": "running", "message": ""}
        with self._changed:
            if name == "stage_started":
                self._earlier[stage] = self._records.pop(stage, [])
                changes |= {"stage": stage, "progress": {}}
            elif name == "resumed":
                kept = [record for record in self._earlier.get(stage, []) if record["step"] <= event["step"]]
                self._records[stage] = kept + self._records.get(stage, [])
            elif stage and name in ("progress", "evaluation", "merge"):  # not the evaluation of a checkpoint
                add_record(self._records.setdefault(stage, []), event)
                changes |= {"progress": event} if name == "progress" else {}
            elif name in ("retrying", "diverged"):
                state = "waiting" if name == "retrying" else "running"
                changes = {"state": state, "message": first_line(str(event["message"]))}
            elif name in ("stage_finished", "stage_skipped", "checkpoint_stored") and event.get("uri"):
                self._records.pop(stage, None)  # they are in the store's metrics.jsonl now
            elif name not in ("dataset_ready", "evaluated"):
                return
            self._status = self._status.model_copy(update=changes)
            self._dirty, self._urgent = True, self._urgent or name != "progress"
            self._changed.notify_all()

    def _run(self) -> None:
        written_at = -self._every_seconds
        while True:
            with self._changed:
                while not self._closing and not (self._dirty and self._urgent):
                    left = written_at + self._every_seconds - time.monotonic()
                    if self._dirty and left <= 0:
                        break
                    self._changed.wait(left if self._dirty else None)
                if not self._dirty:
                    return
                self._dirty = self._urgent = False
                records = tuple(record for stage in self._records.values() for record in stage)
                changes = {"records": records, "written_at": datetime.now(UTC)}
                data = self._status.model_copy(update=changes).to_bytes()
            self._tried(partial(self._put, data))
            written_at = time.monotonic()

    def _put(self, data: bytes) -> None:
        self._still_ours()
        self._store.put_bytes(status_key(self._run_id), data)

    def _tried(self, call: Callable[[], T]) -> T | None:
        """Return what the call returns; None, after one warning, if it fails."""
        try:
            return call()
        except Exception as error:
            if not self._failed:
                _log.warning("`relora watch` and `relora runs` may not show how far this run is: %s", error)
            self._failed = True
            return None


def add_record(records: list[dict[str, Any]], event: Event) -> None:
    """Add what an event tells to the records of its stage, in the form of metrics.jsonl; thin out the oldest half.

    The latest loss is told until there is a newer one: it counts once.
    """
    kind = {"progress": "train"}.get(event["event"], event["event"])
    left_out = {"event", "start_step", "end_step", "eta_seconds"}
    record = {"kind": kind, **{key: value for key, value in event.items() if key not in left_out}}
    train = [one for one in records if one["kind"] == "train"]
    if kind == "train" and train and train[-1]["loss"] == record["loss"]:
        return
    records.append(record)
    if len(train) >= MAX_RECORDS:
        dropped = {id(one) for one in train[1::2]}
        records[:] = [one for one in records if id(one) not in dropped]


def end_of(error: BaseException | None) -> dict[str, str]:
    """Return what a status says of a flow that has ended with this error, or without one. Pure."""
    if error is None:
        return {"state": "done", "message": ""}
    if not isinstance(error, Exception) or isinstance(error, TrainerInterruptedError):
        return {"state": "interrupted", "message": ""}
    state = "diverged" if isinstance(error, DivergedError) else "failed"
    told = str(error) if isinstance(error, ReLoRAError) else f"{type(error).__name__}: {error}"
    return {"state": state, "message": first_line(told)}


def first_line(message: str) -> str:
    """Return the first line of an error's message, without credentials."""
    return masked(message.strip().partition("\n")[0])
