"""Flows that tests look at from outside: a command of its own, so that it has settings and a console of its own.

`python tests/observed_flows.py STORE_URI WORK_DIRECTORY` with PREFECT_API_URL set. Prints how each flow ended.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hanging_api import hanging_way_to

from relora_train import events
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.cli.local_flow import load_installed, set_orchestrator_environment
from relora_train.events import Event
from relora_train.method.stages import Stage, stages_after
from relora_train.runs.evaluations import dataset_of
from relora_train.runs.run import Run
from relora_train.settings.base import FrozenConfig
from relora_train.settings.load import load_profile
from relora_train.storage.opening import open_store

RUN_ID = "observed"
CHATTER_EVENTS = 2_000
CHATTER_SECONDS_APART = 0.1
STRAY_LINE = "a library's stray print"


class KillOnce(logging.Handler):
    """Kills the trainer of cycle-1 after its first snapshot, once: the task's retry goes on from there."""

    def __init__(self) -> None:
        super().__init__()
        self.pid: int | None = None
        self.done = False

    def emit(self, record: logging.LogRecord) -> None:
        event: Event = record.event
        if event.get("stage") != "cycle-1" or self.done:
            return
        if event["event"] == "stage_started":
            self.pid = event["pid"]
        elif event["event"] == "snapshot_committed" and self.pid:
            self.done = True
            os.kill(self.pid, signal.SIGKILL)


def tell(what: str, outcome: object) -> None:
    sys.stdout.write(f"{what}: {outcome}\n")
    sys.stdout.flush()


def attempt(what: str, flow: Any, **parameters: Any) -> None:
    started = time.monotonic()
    try:
        flow(**parameters)
        outcome = "completed"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    tell(f"{what} in {time.monotonic() - started:.1f} s", outcome)


def train(flow: Any, store_uri: str) -> None:
    """One run that is killed on its way, then the same again with nothing left to do."""
    kill = KillOnce()
    events.listen(kill)
    overrides = {"launch.threads": 1, "snapshots.every_steps": 4}
    attempt("trained", flow, profile="smoke", overrides=overrides, run_id=RUN_ID, store=store_uri)
    attempt("repeated", flow, profile="smoke", overrides=overrides, run_id=RUN_ID, store=store_uri)
    events.unlisten(kill)
    tell("killed", kill.done)


def fail(flow: Any, store_uri: str) -> None:
    """Flows whose store refuses or does not answer."""
    right = {name: os.environ[name] for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3")}
    endpoint, canary = right["AWS_ENDPOINT_URL_S3"], os.environ["CANARY_IN_ENDPOINT"]
    os.environ["RELORA_S3_MAX_ATTEMPTS"] = "1"
    for what, wrong in {
        "wrong credentials": {"AWS_SECRET_ACCESS_KEY": f"{right['AWS_SECRET_ACCESS_KEY']}-mistyped"},
        "unreachable": {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"},
        "password in the endpoint": {"AWS_ENDPOINT_URL_S3": endpoint.replace("//", f"//user:{canary}@")},
        "signature in the endpoint": {"AWS_ENDPOINT_URL_S3": f"{endpoint}/?X-Amz-Signature={canary}"},
    }.items():
        os.environ.update(right | wrong)
        attempt(what, flow, profile="smoke", store=store_uri)
    os.environ.update(right)


def be_ignored(store_uri: str) -> None:
    """A stage is trained while the server never answers to an artifact. Prefect logs that way to the end."""
    from prefect import flow
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.artifacts import publish_markdown
    from tasks.train import train_cycle

    parent = resolve_checkpoint(f"{RUN_ID}@cycle-1", open_store(store_uri))
    profile = load_profile("smoke", {"launch.threads": 1})
    run = Run("unanswered", store_uri, profile, branches=True)

    @flow(name="unanswered", flow_run_name="unanswered")
    def unanswered() -> None:
        train_cycle(run, stages_after(profile, parent.manifest)[0], dataset_of(parent), parent)
        publish_markdown("unanswered", "Nobody will read this.", "Neither this.")

    api_url = hanging_way_to(os.environ["PREFECT_API_URL"], swallows=b" /api/artifacts/")
    with temporary_settings({PREFECT_API_URL: api_url}):
        attempt("unanswered", unanswered)


def chatter(directory: Path) -> None:
    """A worker that says far too much: its events by a clock that runs fast, its stray prints."""
    from prefect import flow, task

    from relora_train.runs.workers import run_worker
    from tasks.artifacts import StageArtifacts
    from tasks.observe import forward_events

    (directory / "talker.py").write_text(
        "import sys\nfrom relora_train.events import encode\n"
        f"for step in range({CHATTER_EVENTS}):\n"
        "    sys.stdout.write(encode('progress', stage='talk', step=step, start_step=0, end_step=10**6, loss=1.0,\n"
        "                            learning_rate=0.1, tokens_per_second=1.0, eta_seconds=1.0))\n"
        f"sys.stdout.write({STRAY_LINE!r} + '\\n')\n"
    )
    os.environ["PYTHONPATH"] = f"{directory}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    seconds = 0.0

    def clock() -> float:
        return seconds

    @task(task_run_name="talk")
    def talk() -> None:
        stage = Stage("talk", "full", 0, 10**6, 0, phase_step=0)
        with StageArtifacts("chatter", stage, clock=clock) as shown:
            listener = shown.watch(forward_events(clock=clock))

            def on_event(event: Event) -> None:
                nonlocal seconds
                seconds += CHATTER_SECONDS_APART
                listener(event)

            run_worker("talker", FrozenConfig(), directory / "request.json", on_event=on_event)

    @flow(name="chatter", flow_run_name="chatter")
    def chatty() -> None:
        talk()

    attempt("talked", chatty)


def main() -> None:
    store_uri, directory = sys.argv[1], Path(sys.argv[2])
    set_orchestrator_environment(verbose=True)
    pretrain = load_installed("pretrain")
    from tasks.store import open_run_store

    open_run_store.retry_delay_seconds = [0, 0, 0]
    train(pretrain, store_uri)
    chatter(directory)
    fail(pretrain, store_uri)
    be_ignored(store_uri)


if __name__ == "__main__":
    main()
