"""`relora watch` and `relora metrics`: a run's curves and numbers, from its store alone."""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.cli.curves import axis, curve
from relora_train.cli.options import RunName, Store, echo_json, open_named
from relora_train.cli.output import View, console_for_people, show
from relora_train.reports.event_text import event_line
from relora_train.runs.metrics import stored_metrics, with_running
from relora_train.runs.survey import RunOverview, survey_runs
from relora_train.settings.objectives import measures_in
from relora_train.storage.base import ObjectStore
from relora_train.text import count, duration

_GOING_ON = ("running", "waiting")
_ROWS_BESIDE_THE_LOSS = 14
_SHOWN_STAGES = 4

Records = Sequence[Mapping[str, Any]]


def watch(
    run: RunName,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks at the store.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Draw it once and end.")] = False,
    store: Store = None,
) -> None:
    """Show the curves of a run live, from any machine, until it ends or Ctrl-C; piped, a line at a time."""
    console = console_for_people()
    try:
        opened = open_named(store)
        if once or not console.is_terminal:
            _follow(console, opened, run, every=every, once=once)
            return
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            stored: dict[int, list[dict[str, Any]]] = {}  # by the number of checkpoints: read again when there are more
            while True:
                overview = _look(opened, run)
                if overview.checkpoint_count not in stored:
                    stored = {overview.checkpoint_count: stored_metrics(opened, run)}
                records = with_running(stored[overview.checkpoint_count], run, overview.status)
                view = run_view(overview, records, width=console.width, height=console.height)
                live.update(Group(*view), refresh=True)
                if overview.state not in _GOING_ON:
                    return
                time.sleep(every)
    except KeyboardInterrupt:
        return


def metrics(
    run: RunName,
    as_csv: Annotated[bool, typer.Option("--csv/--json", help="The form on standard output.")] = True,
    store: Store = None,
) -> None:
    """Print the metrics of a run's line, and those of its running stage as far as its flow has told them."""
    opened = open_named(store)
    status = _look(opened, run).status  # first: a stage that is stored meanwhile is told by the store
    records = with_running(stored_metrics(opened, run), run, status)
    if not as_csv:
        from relora_train.reports.ranks.measures import json_value

        echo_json(json_value(records))
        return
    first = ("run_id", "stage", "kind", "step")
    flat = [{key: value for key, value in one.items() if not isinstance(value, (dict, list))} for one in records]
    columns = [*first, *sorted({key for one in flat for key in one} - {*first})]
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    typer.echo(written.getvalue(), nl=False)


def _look(store: ObjectStore, run: str) -> RunOverview:
    """Return how a run stands. Raise what is to be said of one that is not there."""
    found = survey_runs(store, check_run_id(run))
    if not found:
        resolve_checkpoint(f"{run}@latest", store)
    return found[0]


def _follow(console: Console, store: ObjectStore, run: str, *, every: float, once: bool) -> None:
    told = None
    while True:
        overview = _look(store, run)
        if once:
            records = with_running(stored_metrics(store, run), run, overview.status)
            show(console, run_view(overview, records, width=console.width, height=40))
            return
        progress = overview.status.progress if overview.status and overview.state == "running" else {}
        line = f"{_state(overview)}  {event_line(progress) if progress else overview.message}".rstrip()
        if line != told:
            console.print(Text(line), soft_wrap=True)
            told = line
        if overview.state not in _GOING_ON:
            return
        time.sleep(every)


def run_view(run: RunOverview, records: Records, *, width: int, height: int) -> View:
    """Return the picture of a run: state, bar, loss, learning rate with merges, evaluations. At most `height` rows."""
    train = [one for one in records if one.get("kind") == "train"]
    last = run.planned_steps or max((one["step"] for one in train), default=1)
    span = (min((one["step"] for one in train), default=0), last)
    merges = [one["step"] for one in records if one.get("kind") == "merge"]
    rows = max(3, min(14, height - _ROWS_BESIDE_THE_LOSS))
    parts: View = [Text(_headline(run), style="bold", no_wrap=True, overflow="ellipsis"), Text(_bar(run, width))]
    for name, rows_of in (("loss", rows), ("learning_rate", 3)):
        points = [(one["step"], one[name]) for one in train if isinstance(one.get(name), (int, float))]
        now = f"  now {points[-1][1]:.4g}" if points else ""
        parts.append(Text.assemble((name.replace("_", " "), "bold"), now))
        parts += [
            Text(line, style="cyan", no_wrap=True, overflow="crop")
            for line in curve(points, width=width, height=rows_of, span=span, marks=merges)
        ]
    parts.append(Text(axis(span, width=width), style="dim", no_wrap=True, overflow="crop"))
    told = [_evaluated(stage, records) for stage in dict.fromkeys(str(one["stage"]) for one in records)]
    parts += [
        Text(line, no_wrap=True, overflow="ellipsis") for line in [line for line in told if line][-_SHOWN_STAGES:]
    ]
    if run.message:
        parts += [Text(run.message, style="yellow", no_wrap=True, overflow="ellipsis")]
    return parts


def _state(run: RunOverview) -> str:
    state = "waiting to retry" if run.state == "waiting" else run.state
    return f"{run.run_id}  {state}, {run.stage or 'no stage yet'}"


def _headline(run: RunOverview) -> str:
    age = duration(max(0.0, (datetime.now(UTC) - run.modified_at).total_seconds()))
    by = f", held by {run.holder}" if run.holder else ""
    return f"{_state(run)}{by}, last heard {age} ago"


def _bar(run: RunOverview, width: int) -> str:
    progress = run.status.progress if run.status and run.state == "running" else {}
    left = ""
    if progress and run.planned_steps and progress["end_step"] > progress["step"]:
        each = progress["eta_seconds"] / (progress["end_step"] - progress["step"])
        left = f", {duration(each * (run.planned_steps - progress['step']))} left"
    told = f"{count(run.step)} of {count(run.planned_steps)} steps{left}"
    room = max(4, width - len(told) - 3)
    done = round(room * min(1.0, run.step / run.planned_steps)) if run.planned_steps else 0
    return f"{'━' * done}{'╌' * (room - done)}  {told}"


def _evaluated(stage: str, records: Records) -> str | None:
    """Return what a stage's evaluations and merge say; None before any."""
    of_stage = [one for one in records if one["stage"] == stage]
    scores = {one["when"]: one for one in of_stage if one.get("kind") == "evaluation" and "when" in one}
    if not scores:
        return None
    headline = measures_in(next(iter(scores.values()))).headline
    before, after = (scores.get(when, {}).get(headline.key) for when in ("before", "after"))
    merged = next((one for one in of_stage if one.get("kind") == "merge"), None)
    norm = merged.get("relative_update_norm") if merged else None
    tail = f", merged, ‖ΔW‖/‖W‖ {norm:.3f}" if norm is not None else ""
    shown = headline.arrow(before, after) if after is not None else headline.text(before)
    return f"{stage}: {headline.name} {shown}{tail}"
