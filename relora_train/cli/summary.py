"""The end of `relora run`: what was done, what was reused, what the model writes, where everything lies. Light."""

from __future__ import annotations

from pathlib import PurePosixPath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from relora_train.cli.tables import add_row, common_place, samples_lines, table
from relora_train.runs.divergence import divergence_text
from relora_train.runs.summary import RunSummary, StageSummary
from relora_train.settings.measures import Measures
from relora_train.settings.objectives import measures_in
from relora_train.storage.opening import uri_to_path
from relora_train.text import counted, duration, short_count, short_duration

_NOTHING_LEFT = (
    "The checkpoint this run started from has all of the profile's cycles: nothing was left to train. "
    "More cycles: --set schedule.cycles=N, with N the number in all."
)


def print_summary(console: Console, summary: RunSummary, *, seconds: float) -> None:
    """Print a finished run: one table, 100 columns wide at most, then samples and places."""
    console.print()
    prefix = common_place([stage.uri for stage in summary.stages])
    if summary.stages:
        console.print(Text(f"Checkpoints in {place(prefix)}"), soft_wrap=True)
        console.print(_stages(summary, prefix))
    else:
        console.print(Text(_NOTHING_LEFT))
    for record in summary.evaluations:
        if record.get("samples"):
            headline = measures_in(record).headline
            scored = f"{headline.name} {headline.text(record[headline.key])}"
            console.print(Text(f"\nAfter {record['stage']} ({scored}) the model writes:", style="bold"))
            for line in samples_lines(record):
                console.print(line)
    console.print()
    for text in closing_lines(summary, seconds=seconds):
        console.print(Text(text), soft_wrap=True)


def closing_lines(summary: RunSummary, *, seconds: float) -> list[str]:
    """Return the lines with places, what was reused, and the time."""
    lines = [f"{stage.stage} {divergence_text(stage.divergence)}." for stage in summary.stages if stage.divergence]
    if summary.later_stages:
        lines.append(
            f"Not of this command: {', '.join(summary.later_stages)}, which another one added to the run. The report "
            f"shows all; go on from there with --resume-from {summary.run_id}@latest."
        )
    lines.append(f"Report: {place(summary.report_uri)}")
    pictures = [PurePosixPath(uri) for uri in summary.picture_uris]
    if pictures:
        lines.append(f"Plots:  {', '.join(picture.stem for picture in pictures)} ({pictures[0].suffix[1:]})")
    reused = reused_text(summary)
    if reused:
        lines.append(f"Reused: {reused}")
    return [*lines, f"Run {summary.run_id} finished in {duration(seconds)}."]


def reused_text(summary: RunSummary) -> str:
    """Return 'dataset, 5 stages, 2 evaluations'; '' for nothing."""
    stages = sum(stage.reused for stage in summary.stages)
    parts = ["dataset"] if summary.dataset_reused else []
    parts += [counted(stages, "stage")] if stages else []
    parts += [counted(summary.evaluations_reused, "evaluation")] if summary.evaluations_reused else []
    return ", ".join(parts)


def place(uri: str) -> str:
    """Return a path for what lies on this machine, else the URI."""
    return str(uri_to_path(uri)) if uri.startswith("file://") else uri


def _stages(summary: RunSummary, prefix: str) -> Table:
    measures = measures_in(summary.stages[-1].evaluation)
    columns = ("stage", "steps", "tokens", measures.headline.short, measures.second.short, "time", "checkpoint")
    made = table(*columns, left=("checkpoint",))
    for stage in summary.stages:
        add_row(made, *_row(stage, measures, prefix))
    return made


def _row(stage: StageSummary, measures: Measures, prefix: str) -> tuple[str, ...]:
    headline, second = measures.headline, measures.second
    return (
        stage.stage,
        f"{stage.start_step + 1}–{stage.end_step}",
        short_count(stage.tokens),
        headline.change(stage.evaluation, digits=headline.short_digits),
        second.change(stage.evaluation, digits=second.short_digits),
        "reused" if stage.reused else short_duration(stage.seconds),
        stage.uri.removeprefix(prefix),
    )
