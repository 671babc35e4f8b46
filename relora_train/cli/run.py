"""`relora run`: a profile from wherever its run stands. `run_shown` serves the other commands that run a flow."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.cli.local_flow import TerminatedError, run_flow
from relora_train.cli.options import AsJson, ProfileName, Sets, Store, Verbose, open_named
from relora_train.cli.output import console_for_people, tell
from relora_train.cli.precheck import check_inputs
from relora_train.cli.progress import RunProgress, shown_progress
from relora_train.cli.summary import print_summary
from relora_train.errors import TrainerInterruptedError
from relora_train.method.stages import stages_after
from relora_train.runs.find import check_settings
from relora_train.runs.run import Run, choose_run_id
from relora_train.runs.summary import RunSummary
from relora_train.settings import load as profiles

_STARTING = "starting Prefect, which takes ten to twenty seconds"
_ASKING = "starting the run on the Prefect server of PREFECT_API_URL"
_CONTINUE = "Every committed stage is kept; the same command goes on from there."


def run(
    profile: ProfileName,
    sets: Sets = None,
    run_id: Annotated[
        str | None,
        typer.Option(help="Name of the run; the same name continues it. Derived from the settings when absent."),
    ] = None,
    store: Store = None,
    resume_from: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Start from this checkpoint of any run; other settings make a branch."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train a profile from wherever its run stands: tokenize, warm start, cycles, evaluation, report."""
    started = time.monotonic()
    settings = profiles.load_profile(profile, sets or ())
    if run_id is not None:
        check_run_id(run_id)
    opened = open_named(store)
    opened.preflight()
    check_inputs(settings, resumed=resume_from is not None)
    parent = resolve_checkpoint(resume_from, opened).manifest if resume_from else None
    stages = stages_after(settings, parent)
    if parent is None:
        check_settings(Run(run_id or choose_run_id(settings, None), opened.uri, settings), stages)
    parameters = {
        "profile": profile,
        "overrides": dict(profiles.parse_override(text) for text in sets or ()),
        "run_id": run_id,
        "store": opened.uri,
        "resume_from": resume_from,
    }
    console = console_for_people(to_stderr=as_json)
    summary: RunSummary = run_shown("pretrain", parameters, [stage.name for stage in stages], console, verbose=verbose)
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
    else:
        print_summary(console, summary, seconds=time.monotonic() - started)


def run_shown(flow: str, parameters: dict[str, Any], stages: Sequence[str], console: Console, *, verbose: bool) -> Any:
    """Run a flow with its progress shown and return its result; `stages` are announced in this order.

    Raises what the flow raised, TrainerInterruptedError after Ctrl-C; exits with 143 after SIGTERM.
    """
    try:
        with _display(console, stages, verbose=verbose) as on_notice:
            return run_flow(flow, parameters, on_notice=on_notice, verbose=verbose)
    except KeyboardInterrupt:
        raise TrainerInterruptedError(f"Stopped by Ctrl-C. {_CONTINUE}") from None
    except TerminatedError as error:
        tell(f"Stopped by {error}. {_CONTINUE}")
        raise SystemExit(error.exit_code) from None


@contextmanager
def _display(console: Console, stages: Sequence[str], *, verbose: bool) -> Iterator[Callable[[str], None] | None]:
    """Progress, and where notices go; with `verbose` nothing, because Prefect's log tells all."""
    if verbose:
        yield None
        return
    first = _ASKING if os.environ.get("PREFECT_API_URL") else _STARTING
    with shown_progress(console, stages, first=first) as progress, _interrupt_shown_by(progress):
        yield progress.notice


@contextmanager
def _interrupt_shown_by(progress: RunProgress) -> Iterator[None]:
    """Ctrl-C is answered at once, though the trainer first ends its step."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        progress.stopping()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
