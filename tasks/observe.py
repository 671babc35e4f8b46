"""The view of a task run: log lines at a bounded rate, states named for what happened, the origin of its results."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, cast

from prefect.client.schemas.objects import State
from prefect.context import get_run_context
from prefect.events import emit_event
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.states import Completed

from relora_train import events
from relora_train.errors import ReLoRAError
from relora_train.events import Event
from relora_train.reports.event_text import event_line
from relora_train.text import size

_LOG_SECONDS = 10.0

CHECKPOINTS_OF_ROOM = 3
"""Fewer than so many more on a volume are an alarm: one that is written, one that is stored, and their snapshots."""

T = TypeVar("T")


class _OwnErrors(logging.Filter):
    """Logs an error of this project as its message: a traceback tells nothing to the person who can mend it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ReLoRAError):
            record.msg, record.args, record.exc_info = "%s", (error,), None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_OwnErrors())


def forward_events(*, clock: Callable[[], float] = time.monotonic) -> Callable[[Event], None]:
    """Return a listener for run_worker that logs progress every ten seconds, and everything else at once."""
    logger = run_logger()
    last_logged = clock()

    def on_event(event: Event) -> None:
        nonlocal last_logged
        events.emit(**event)
        now = clock()
        if event["event"] in ("progress", "tokenize_progress"):
            if now - last_logged < _LOG_SECONDS:
                return
            last_logged = now
        quiet = event["event"] in ("snapshot_committed", "snapshot_failed")
        logger.log(logging.DEBUG if quiet else logging.INFO, describe(event))

    return on_event


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Return the logger of the task or flow run around us; without a server a flow is none."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("relora_train.flows")


def describe(event: Event) -> str:
    """Return an event as one line for the log, which has room for details that a terminal leaves out."""
    line = event_line(event)
    if event["event"] == "progress":
        line = f"{event['stage']}: {line}"
    if event["event"] == "diverged":
        line = f"{line}: {event['message']}"
    if event["event"] == "stage_started":
        line += "".join(f"; {count} layers: {order}" for order, count in event.get("products", {}).items())
        line += f"; float32 products: {event['matmul']}" if "matmul" in event else ""
    return line


def tell_low_disk(run_id: str, directories: Iterable[Path], checkpoint_bytes: int) -> None:
    """Warn, and emit the event relora.disk.low, for each volume that has no room for three more such checkpoints.

    An automation makes an alarm of it. A directory that cannot be asked is skipped.
    """
    volumes = dict[int, Path]()
    for directory in directories:
        with suppress(OSError):
            volumes.setdefault(directory.stat().st_dev, directory)
    for directory in volumes.values():
        free_bytes = shutil.disk_usage(directory).free
        if free_bytes < CHECKPOINTS_OF_ROOM * checkpoint_bytes:
            told = (
                f"{directory} has {size(free_bytes)} free, and a checkpoint of {run_id} takes "
                f"{size(checkpoint_bytes)}: enlarge the volume, or `relora prune`."
            )
            run_logger().warning("%s", told)
            emit_event("relora.disk.low", {"prefect.resource.id": f"relora.run.{run_id}"}, payload={"told": told})


def provenance() -> dict[str, str]:
    """Return the ids of the run around us, for the manifest; informative only."""
    task_run = getattr(get_run_context(), "task_run", None)
    if task_run is None or task_run.flow_run_id is None:  # nobody could look it up
        return {}
    return {"prefect_flow_run_id": str(task_run.flow_run_id), "prefect_task_run_id": str(task_run.id)}


def skipped(outcome: T, what: str) -> T:
    """Return this from a task to show its run as Skipped, with the reason; the caller takes the outcome by `done`."""
    return cast(T, Completed(name="Skipped", message=f"{what}: there already", data=outcome))


def named(name: str, outcome: T, message: str) -> T:
    """Return this from a task or a flow to have its run end in a successful state of this name."""
    return cast(T, Completed(name=name, message=message, data=outcome))


def done(value: T) -> T:
    """Return the outcome of a task call. If the task returned a state, Prefect hands out its data wrapped."""
    return cast(T, getattr(value.data, "result", value.data)) if isinstance(value, State) else value
