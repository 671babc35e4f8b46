"""Progress, merges, checkpoints and the report, as the orchestrator's UI shows them beside states and logs.

Best effort and never in the way: a thread makes the calls while the task goes on. An API that refuses, or never
answers, costs a warning and the few seconds for which the end of a task waits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self, cast
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.events import Event
from relora_train.method.stages import Stage
from relora_train.reports.event_text import checkpoint_markdown, event_line, finished_text, merge_table, merge_text
from relora_train.runs.background import Background
from relora_train.runs.run import StageOutcome
from tasks.alone import has_server
from tasks.observe import run_logger

PROGRESS_SECONDS = 10.0
"""Between two updates of the same progress artifact."""

WAIT_SECONDS = 5.0
"""The time for which the end of a task waits for calls that are still on their way."""

_WAIT_SECONDS_WHEN_STOPPED = 1.0  # a cancelled run is killed soon


class ArtifactQueue(Background):
    """Makes calls of the orchestrator's API on a thread of its own, one after another.

    Only the latest of calls with the same name is kept, so the queue is bounded. Leaving the block waits for the rest,
    for `wait_seconds` at most; what is not through by then is dropped. To be entered inside a flow or task run, whose
    context the calls see.
    """

    def __init__(self, *, wait_seconds: float = WAIT_SECONDS) -> None:
        super().__init__("artifacts")
        self._wait_seconds = wait_seconds
        self._waiting: dict[str, Callable[[], object]] = {}
        self._failed = False
        self._logger = run_logger()

    def offer(self, name: str, call: Callable[[], object]) -> None:
        """Make a call soon, instead of one of the same name that still waits. Returns at once; without a server too."""
        if not has_server():
            return
        with self._changed:
            self._waiting[name] = call
            self._changed.notify()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        self._close(min(self._wait_seconds, _WAIT_SECONDS_WHEN_STOPPED) if stopped else self._wait_seconds)
        if self._thread.is_alive():
            with self._changed:
                self._waiting.clear()
            self._logger.warning("Prefect's API is slow to answer: its pages will not show all of this task.")

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                name = next(iter(self._waiting))
                call = self._waiting.pop(name)
            try:
                call()
            except Exception as error:
                if not self._failed:  # the kind of error only: its text may hold the API's address with a password
                    self._logger.warning("Prefect's API did not take the artifact %s (%s).", name, type(error).__name__)
                self._failed = True


class StageArtifacts:
    """One stage in the UI: how far it is, every PROGRESS_SECONDS; when done its checkpoint and what its merge did."""

    def __init__(self, run_id: str, stage: Stage, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_id, self._stage, self._clock = run_id, stage, clock
        self._publisher = ArtifactQueue()
        self._artifact: UUID | None = None
        self._percent = 0.0
        self._shown_at = -PROGRESS_SECONDS
        self._resumed_at: int | None = None

    def __enter__(self) -> Self:
        self._publisher.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._show(self._percent, f"**{self._stage.name} stopped:** {kind.__name__}. See the log.")
        self._publisher.__exit__(kind, error, at)

    def watch(self, on_event: Callable[[Event], None]) -> Callable[[Event], None]:
        """Return a listener that shows progress and passes every event on."""

        def watching(event: Event) -> None:
            on_event(event)
            if event["event"] == "stage_started":
                self._show(0.0, event_line(event))
            elif event["event"] == "resumed":
                self._resumed_at = event["step"]
            elif event["event"] == "progress" and self._clock() - self._shown_at >= PROGRESS_SECONDS:
                self._shown_at = self._clock()
                resumed = f"; resumed at step {self._resumed_at:,}" if self._resumed_at is not None else ""
                # The stage's own steps: one that resumes from a snapshot begins where that stands.
                percent = round(100.0 * (event["step"] - self._stage.start_step) / self._stage.steps, 1)
                self._show(percent, f"{self._stage.name}: {event_line(event)}{resumed}")

        return watching

    def finished(self, outcome: StageOutcome) -> None:
        """Show the stage as complete, with its checkpoint if that is stored; one that was there already says so."""
        self._show(100.0, finished_text(self._stage, outcome))
        if outcome.reused:
            return
        checkpoint = outcome.checkpoint
        if outcome.stored:
            self._offer_new(create_markdown_artifact, **_checkpoint_fields(self._run_id, checkpoint))
        if checkpoint.manifest.merge_report:
            table, what = merge_table(checkpoint.manifest.merge_report), merge_text(checkpoint)
            self._offer_new(create_table_artifact, self._key("merge"), table=table, description=what)

    def _offer_new(self, create: Callable[..., object], key: str, **fields: Any) -> None:
        self._publisher.offer(key, partial(create, key=artifact_key(key), **fields))

    def _show(self, percent: float, text: str) -> None:
        self._percent = percent
        self._publisher.offer("progress", partial(self._send, percent, text))

    def _send(self, percent: float, text: str) -> None:
        """Make the artifact once, then change it. Runs on the queue's thread."""
        if self._artifact is None:
            created = create_progress_artifact(percent, key=self._key("progress"), description=text)
            self._artifact = cast(UUID, created)  # on a thread without an event loop it is the id, not a coroutine
        else:
            update_progress_artifact(self._artifact, percent, description=text)

    def _key(self, what: str) -> str:
        return artifact_key(what, self._run_id, self._stage.name)


def show_checkpoint(run_id: str, checkpoint: CheckpointRef) -> None:
    """Show a stored checkpoint: where it lies and how to go on from it."""
    publish_markdown(**_checkpoint_fields(run_id, checkpoint))


def _checkpoint_fields(run_id: str, checkpoint: CheckpointRef) -> dict[str, str]:
    stage = checkpoint.manifest.stage
    return {
        "key": f"checkpoint-{run_id}-{stage}",
        "markdown": checkpoint_markdown(checkpoint),
        "description": f"Checkpoint of {run_id}, stage {stage}",
    }


def publish_markdown(key: str, markdown: str, description: str) -> None:
    """Show Markdown in the orchestrator's UI. Best effort, in bounded time."""
    with ArtifactQueue() as publisher:
        create = partial(create_markdown_artifact, key=artifact_key(key), markdown=markdown, description=description)
        publisher.offer(key, create)


def name_flow_run(profile: str, run_id: str) -> None:
    """Name the flow run around us by profile and run id, once they are known. Best effort, in bounded time."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    flow_run_id, name = context.flow_run.id, run_id if run_id.startswith(profile) else f"{profile} · {run_id}"
    with ArtifactQueue() as publisher:
        publisher.offer("name", lambda: get_client(sync_client=True).set_flow_run_name(flow_run_id, name))


def artifact_key(*parts: str) -> str:
    """Return parts as the key of an artifact: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
