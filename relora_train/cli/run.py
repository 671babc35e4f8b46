"""The commands that take longer: run a profile, score a checkpoint, write a report. Imports no torch and no Prefect."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.cli.local_flow import TerminatedError, run_flow
from relora_train.cli.output import tell
from relora_train.cli.precheck import check_inputs
from relora_train.cli.progress import RunProgress, shown_progress
from relora_train.errors import TrainerInterruptedError
from relora_train.method.stages import stages_after
from relora_train.runs.evaluations import EvaluationOutcome, recorded_evaluations, score_checkpoint
from relora_train.runs.run import Run, check_settings, choose_run_id, default_store_uri, line_of
from relora_train.runs.summary import RunSummary
from relora_train.settings import load as profiles
from relora_train.storage.opening import open_store

if TYPE_CHECKING:
    from relora_train.reports.store import StoredReport

_STARTING = "starting Prefect, which takes ten to twenty seconds"
_CONTINUE = "Every committed stage is kept; the same command goes on from there."


def run_profile(
    name: str,
    sets: Sequence[str],
    *,
    run_id: str | None,
    store_uri: str | None,
    resume_from: str | None,
    console: Console,
    verbose: bool,
) -> RunSummary:
    """Run the flow `pretrain` and return its summary; what can be refused is refused before anything starts.

    Raises the library's own errors, TrainerInterruptedError after Ctrl-C; exits with 143 after SIGTERM.
    """
    settings = profiles.load_profile(name, sets)
    if run_id is not None:
        check_run_id(run_id)
    store = open_store(store_uri or default_store_uri())
    store.preflight()
    check_inputs(settings, resumed=resume_from is not None)
    parent = resolve_checkpoint(resume_from, store).manifest if resume_from else None
    stages = stages_after(settings, parent)
    if parent is None:
        check_settings(Run(run_id or choose_run_id(settings, None), store.uri, settings), stages)
    parameters = {
        "profile": name,
        "overrides": dict(profiles.parse_override(text) for text in sets),
        "run_id": run_id,
        "store": store.uri,
        "resume_from": resume_from,
    }
    summary: RunSummary = run_shown(
        "pretrain", parameters, [stage.name for stage in stages], console=console, verbose=verbose
    )
    return summary


def run_shown(flow: str, parameters: dict[str, Any], stages: Sequence[str], *, console: Console, verbose: bool) -> Any:
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


def evaluate_checkpoint(checkpoint: CheckpointRef, console: Console) -> EvaluationOutcome:
    """Score a checkpoint as score_checkpoint does, saying so meanwhile."""
    with console.status(f"evaluating {checkpoint.manifest.run_id}@{checkpoint.manifest.stage} …"):
        return score_checkpoint(checkpoint, on_event=lambda event: None)


def write_report(checkpoint: CheckpointRef, console: Console) -> StoredReport:
    """Write the report of the line that ends at a checkpoint, with the evaluations recorded beside its run."""
    with console.status("reading checkpoints and drawing …"):
        from relora_train.reports.store import report_run  # matplotlib

        store, line = open_store(checkpoint.store_uri), line_of(checkpoint)
        return report_run(line, recorded_evaluations(store, line), store, checkpoint.manifest.run_id)


@contextmanager
def _display(console: Console, stages: Sequence[str], *, verbose: bool) -> Iterator[Callable[[str], None] | None]:
    """Progress, and where notices go; with `verbose` nothing, because Prefect's log tells all."""
    if verbose:
        yield None
        return
    with shown_progress(console, stages, first=_STARTING) as progress, _interrupt_shown_by(progress):
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
