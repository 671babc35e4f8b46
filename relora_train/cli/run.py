"""`relora run`: a profile from wherever its run stands; `relora join`. `run_shown` serves all that run a flow."""

import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train import events
from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.cli.local_flow import TerminatedError, run_flow
from relora_train.cli.local_server import users_server
from relora_train.cli.options import (
    AsJson,
    Model,
    Pages,
    ProfileName,
    Sets,
    Store,
    Verbose,
    echo_json,
    open_named,
    overrides_of,
    with_model,
)
from relora_train.cli.output import (
    BLANK,
    View,
    Warnings,
    common_place,
    console_for_people,
    place,
    samples_lines,
    show,
    table,
    tell,
)
from relora_train.cli.progress import LastSnapshot, RunProgress, shown_progress
from relora_train.errors import TrainerInterruptedError
from relora_train.method.stages import stages_after
from relora_train.runs import find
from relora_train.runs.divergence import divergence_text
from relora_train.runs.model_check import check_settings
from relora_train.runs.run import Run, RunSummary, StageSummary, choose_run_id
from relora_train.runs.tracking import check_trackers
from relora_train.runs.workers import READY_WORKER, Worker, join_run
from relora_train.settings.load import load_profile
from relora_train.settings.objectives import measures_in
from relora_train.settings.profile import Profile
from relora_train.text import counted, duration, short_count, short_duration
from relora_train.training.models.registry import facts_of

_STARTING = "starting"
_STARTING_SERVER = "starting Prefect's server, which takes some seconds"
_ASKING = "starting the run on the Prefect server of PREFECT_API_URL"
_NOTHING_LEFT = (
    "The checkpoint this run started from has all of the profile's cycles: nothing was left to train. "
    "More cycles: --set schedule.cycles=N, with N the number in all."
)


def run(
    profile: ProfileName,
    sets: Sets = None,
    model: Model = None,
    run_id: Annotated[
        str | None,
        typer.Option(help="Name of the run; the same name continues it. Derived from the settings when absent."),
    ] = None,
    store: Store = None,
    resume_from: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Start from this checkpoint of any run; other settings make a branch."),
    ] = None,
    pages: Pages = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors, and --json.")] = False,
) -> None:
    """Train a profile from wherever its run stands: tokenize, warm start, cycles, evaluation, report."""
    sets = with_model(sets, model)
    settings = load_profile(profile, sets)
    if run_id is not None:
        check_run_id(run_id)
    with closing(Worker(keeps=True)) as worker:
        if not users_server():  # there the worker's warnings belong to a flow run that is yet to begin
            worker.start(settings)  # imports what training needs beside the checks, and what the flow needs
            READY_WORKER.set(worker)
        opened = open_named(store)
        opened.preflight()
        check_inputs(settings, resumed=resume_from is not None)
        parent = resolve_checkpoint(resume_from, opened).manifest if resume_from else None
        stages = stages_after(settings, parent)
        if parent is None:
            find.check_settings(Run(run_id or choose_run_id(settings, None), opened.uri, settings), stages)
        parameters = {
            "profile": profile,
            "overrides": overrides_of(sets),
            "run_id": run_id,
            "store": opened.uri,
            "resume_from": resume_from,
        }
        names = [stage.name for stage in stages]
        shown = {"as_json": as_json, "verbose": verbose, "quiet": quiet}
        run_shown("pretrain", parameters, names, view=summary_view, pages=pages, **shown)


def join(
    rdzv_endpoint: Annotated[str, typer.Option(metavar="HOST:PORT", help="The profile's launch.rdzv_endpoint.")],
    nnodes: Annotated[int, typer.Option(min=2, help="Its launch.nnodes.")],
    node_rank: Annotated[
        int,
        typer.Option(
            min=1,
            envvar=["NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX"],
            help="This machine's number; the flow's has 0.",
        ),
    ],
    nproc_per_node: Annotated[str, typer.Option(help="Its launch.nproc_per_node: a number, or gpu.")] = "1",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    wait_seconds: Annotated[int, typer.Option(min=1, help="Leave when no run has begun or resumed for so long.")] = 600,
) -> None:
    """Train along on another machine, stage after stage, with a run that was started with launch.nnodes above 1."""
    nodes: dict[str, Any] = {"nnodes": nnodes, "node_rank": node_rank, "nproc_per_node": nproc_per_node}
    joined = join_run(rdzv_endpoint=rdzv_endpoint, device=device, wait_seconds=wait_seconds, tell=tell, **nodes)
    tell(f"This machine took part in {joined} of the run's stages.")


def check_inputs(profile: Profile, *, resumed: bool = False) -> str | None:
    """Refuse sources, tokenizers and models on this machine that cannot work; return the dataset's id if it is known.

    Takes seconds and no network. All of it is checked again where it matters; this only spares the wait. Imports torch
    only to be asked for a GPU that the profile wants.
    None for sources that lie on a hub or in a store: asking them takes time that belongs to the run.
    resumed: the run starts from a checkpoint, so that the profile's own model is not loaded.
    Raises SourceUnreadableError, TokenizerError, DeviceError, and what check_settings does.
    """
    from relora_train.data.mixture import inputs_of_sources, resolve_sources
    from relora_train.data.prepare import describe_dataset
    from relora_train.devices import check_devices

    check_devices(profile.launch)
    check_trackers(profile)
    if not resumed:
        check_settings(profile)
    parts = profile.data.parts()
    paths = [path for part in parts for path in (*part.paths, *part.validation_paths)]
    if any(part.source == "hub" for part in parts) or any("://" in path for path in paths):
        return None
    tokenizer = profile.tokenizer if resumed else facts_of(profile).tokenizer()  # a checkpoint brings its own
    if tokenizer.path and not Path(tokenizer.path).expanduser().exists():
        return None  # perhaps on a hub
    if profile.data.sources:
        dataset_id = inputs_of_sources(profile.data, tokenizer, resolve_sources(profile.data)).dataset_id
    else:
        dataset_id, _ = describe_dataset(profile.data, tokenizer)
    return None if resumed else dataset_id


def run_shown(
    flow: str,
    parameters: dict[str, Any],
    stages: Sequence[str] = (),
    *,
    view: Callable[[Any, float], View],
    pages: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool = False,
) -> None:
    """Run a flow with its progress shown, and print its result as JSON or by `view`, which gets the seconds it took.

    pages: start a Prefect server with its pages, unless PREFECT_API_URL names one.
    `stages` are announced in this order; with `verbose` nothing is, because Prefect's log tells all. With `quiet`
    nothing is printed but warnings, errors and JSON.
    Raises what the flow raised, TrainerInterruptedError after Ctrl-C; exits with 143 after SIGTERM.
    """
    started, console, kept = time.monotonic(), console_for_people(to_stderr=as_json), LastSnapshot()
    with_pages = (lambda url: tell(f"Prefect shows this run at {url} until it ends.")) if pages else None
    events.listen(kept)
    try:
        if verbose or quiet:
            warnings = Warnings(logging.WARNING) if quiet else None
            result = run_flow(flow, parameters, warnings=warnings, verbose=verbose, with_pages=with_pages)
        else:
            first = _ASKING if users_server() else _STARTING_SERVER if pages else _STARTING
            with shown_progress(console, stages, first=first) as progress, _interrupt_shown_by(progress):
                result = run_flow(flow, parameters, warnings=progress, with_pages=with_pages)
    except KeyboardInterrupt:
        raise TrainerInterruptedError(f"Stopped by Ctrl-C. {kept.text} {_go_on()}") from None
    except TerminatedError as error:
        tell(f"Stopped by {error}. {kept.text} {_go_on()}")
        raise SystemExit(error.exit_code) from None
    finally:
        events.unlisten(kept)
    if as_json:
        echo_json(result)
    elif not quiet:
        show(console, view(result, time.monotonic() - started))


def _go_on() -> str:
    """Say what to type to go on: the command that was given."""
    return f"To go on, type: {shlex.join(['relora', *sys.argv[1:]])}"


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


def summary_view(summary: RunSummary, seconds: float) -> View:
    """Return the end of a run: one table, 100 columns wide at most, then samples and places."""
    parts: View = [BLANK]
    prefix = common_place([stage.uri for stage in summary.stages])
    if summary.stages:
        measures = measures_in(summary.stages[-1].evaluation)
        scores = (measures.headline, measures.second)

        def row(stage: StageSummary) -> tuple[str, ...]:
            return (
                stage.stage,
                f"{stage.start_step + 1}–{stage.end_step}",
                short_count(stage.tokens),
                *(score.change(stage.evaluation, digits=score.short_digits) for score in scores),
                "reused" if stage.reused else short_duration(stage.seconds),
                stage.uri.removeprefix(prefix),
            )

        columns = ("stage", "steps", "tokens", *(score.short for score in scores), "time", "checkpoint")
        parts.append(Text(f"Checkpoints in {place(prefix)}"))
        parts.append(table(columns, map(row, summary.stages), left=("checkpoint",)))
    else:
        parts.append(Text(_NOTHING_LEFT))
    for record in summary.evaluations:
        if record.get("samples"):
            headline = measures_in(record).headline
            scored = f"{headline.name} {headline.text(record[headline.key])}"
            parts.append(Text(f"\nAfter {record['stage']} ({scored}) the model writes:", style="bold"))
            parts += samples_lines(record)
    return [*parts, BLANK, *map(Text, closing_lines(summary, seconds=seconds))]


def closing_lines(summary: RunSummary, *, seconds: float) -> list[str]:
    """Return the lines with places, what was reused, and the time."""
    lines = [f"{stage.stage} {divergence_text(stage.divergence)}." for stage in summary.stages if stage.divergence]
    if summary.later_stages:
        lines.append(
            f"Not of this command: {', '.join(summary.later_stages)}, which another one added to the run. The report "
            f"shows all; go on from there with --resume-from {summary.run_id}@latest."
        )
    lines.append(f"Report: {place(summary.report_uri)}")
    if pictures := [PurePosixPath(uri) for uri in summary.picture_uris]:
        lines.append(f"Plots:  {', '.join(picture.stem for picture in pictures)} ({pictures[0].suffix[1:]})")
    counts = {"stage": sum(stage.reused for stage in summary.stages), "evaluation": summary.evaluations_reused}
    reused = ["dataset"] * summary.dataset_reused + [counted(number, noun) for noun, number in counts.items() if number]
    if reused:
        lines.append(f"Reused: {', '.join(reused)}")
    return [*lines, f"Run {summary.run_id} finished in {duration(seconds)}."]
