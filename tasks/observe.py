"""The view of a task run: log lines at a bounded rate, states named for what happened, the origin of its results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from prefect.client.schemas.objects import State
from prefect.context import get_run_context
from prefect.logging import get_run_logger
from prefect.states import Completed

from relora_train import events
from relora_train.events import Event
from relora_train.settings.objectives import measures_in

_LOG_SECONDS = 10.0

T = TypeVar("T")


def forward_events(*, clock: Callable[[], float] = time.monotonic) -> Callable[[Event], None]:
    """Return a listener for run_worker that logs progress every ten seconds, and everything else at once."""
    logger = get_run_logger()
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


def describe(event: Event) -> str:
    """Return an event as one line for people."""
    match event["event"]:
        case "progress":
            return (
                f"step {event['step']}/{event['end_step']}  loss {event['loss']:.4f}  lr {event['learning_rate']:.2e}  "
                f"{event['tokens_per_second']:,.0f} tokens/s  {event['eta_seconds']:.0f} s left"
            )
        case "stage_committed":
            return f"stage {event['stage']}: trained and written at step {event['step']}, now stored"
        case "evaluation" if "when" in event:
            headline, second = measures_in(event).headline, measures_in(event).second
            return (
                f"{event['when']} step {event['step']}: validation {headline.name} "
                f"{headline.text(event[headline.key])}, {second.name} {second.text(event[second.key], digits=4)}"
            )
        case "merge":
            return (
                f"merged cycle {event['cycle']}: output changed by {event['max_relative_output_change']:.1e}, "
                f"update/weight norm {event['relative_update_norm']:.4f}, "
                f"effective rank {event['effective_rank']:.1f}, "
                f"{event['optimizer_state_zeroed']:.1%} of the optimizer state of A and B zeroed"
            )
        case "stage_started":
            return (
                f"stage {event['stage']}: steps {event['start_step'] + 1} to {event['end_step']} on {event['device']}, "
                f"{event['trainable_parameters']:,} of {event['parameters']:,} parameters trained"
                + "".join(f"; {count} layers: {order}" for order, count in event.get("products", {}).items())
                + (f"; float32 products: {event['matmul']}" if "matmul" in event else "")
            )
        case "resumed":
            return f"stage {event['stage']}: going on from the snapshot of step {event['step']}"
        case "stopping":
            return f"asked the worker to finish its step, save its state and end within {event['seconds']:.0f} s"
        case "diverged":
            return f"attempt {event['attempt']} of {event['attempts']} of {event['stage']}: {event['message']}"
        case name:
            return f"{name}: " + ", ".join(f"{key}={_short(value)}" for key, value in event.items() if key != "event")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def provenance() -> dict[str, str]:
    """Return the ids of the run around us, for the manifest; informative only."""
    task_run = getattr(get_run_context(), "task_run", None)
    if task_run is None:
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
