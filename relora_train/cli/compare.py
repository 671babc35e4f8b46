"""`relora compare` and `relora experiments`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from relora_train.cli.options import AsJson, Sets, Store, Verbose, answer, open_named
from relora_train.cli.output import console_for_people, tell
from relora_train.cli.precheck import check_inputs
from relora_train.cli.run import run_shown
from relora_train.cli.summary import place
from relora_train.cli.tables import add_row, rows_table, table
from relora_train.errors import ConfigError
from relora_train.experiments.experiment import Experiment, list_experiments, load_experiment
from relora_train.experiments.measured import MeasuredSummary, is_measured, load_measured
from relora_train.runs.model_check import check_settings
from relora_train.settings import load as profiles
from relora_train.settings.measures import LOSS
from relora_train.text import duration

if TYPE_CHECKING:
    from relora_train.experiments.records import ComparisonSummary


def compare(
    experiment: Annotated[str, typer.Argument(help="Name of a shipped experiment, or path of a TOML file.")],
    sets: Sets = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="Instead of the experiment's.", show_default=False)
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option(
            metavar="pretrain/NAME",
            help="Have the runs made side by side by this deployment of the server in PREFECT_API_URL.",
        ),
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run an experiment, every arm at every seed, from wherever it stands; table with errors, differences, report."""
    started = time.monotonic()
    if deployment is not None and not deployment.startswith("pretrain/"):
        raise ConfigError(
            f"--deployment {deployment!r} is no deployment of the flow pretrain: write it as pretrain/NAME."
        )
    overrides, chosen = dict(profiles.parse_override(text) for text in sets or ()), _parse_seeds(seeds)
    without_runs = is_measured(experiment)
    if without_runs:
        load_measured(experiment, overrides, chosen)
    planned = None if without_runs else load_experiment(experiment, overrides, chosen)
    opened = open_named(store)
    opened.preflight()
    if planned is not None:
        for run in planned.runs:
            check_settings(run.profile)
        check_inputs(planned.runs[0].profile)
        for notice in notices(planned):
            tell(notice)
    parameters: dict[str, Any] = {
        "experiment": experiment,
        "overrides": overrides,
        "seeds": chosen,
        "store": opened.uri,
        "deployment": deployment,
    }
    console = console_for_people(to_stderr=as_json)
    summary: ComparisonSummary | MeasuredSummary = run_shown("compare", parameters, (), console, verbose=verbose)
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
        return
    seconds = time.monotonic() - started
    if isinstance(summary, MeasuredSummary):
        print_measured(console, summary, seconds=seconds)
    else:
        print_comparison(console, summary, seconds=seconds)


def experiments(as_json: AsJson = False) -> None:
    """List the shipped experiments."""
    described = [_describe(path) for path in list_experiments()]
    answer(
        as_json,
        record=lambda: described,
        view=lambda: [
            rows_table(
                ("experiment", "arms", "title"),
                ((each["name"], str(len(each["arms"])) if each["arms"] else "–", each["title"]) for each in described),
                left=("title",),
            )
        ],
    )


def _describe(path: Path) -> dict[str, Any]:
    """Return name, title, base profile, arms and time of a shipped experiment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    time_needed = next((line.partition("# Time:")[2].strip() for line in lines if line.startswith("# Time:")), "")
    if is_measured(path.stem):
        about: dict[str, Any] = {
            "title": load_measured(path.stem).config.title,
            "profile": None,
            "arms": [],
            "seeds": [],
        }
    else:
        config = load_experiment(path.stem).config
        about = {"title": config.title, "profile": config.profile, "arms": list(config.arms)}
        about["seeds"] = list(config.seeds)
    return {"name": path.stem, **about, "time": time_needed, "path": str(path)}


def _parse_seeds(text: str | None) -> list[int] | None:
    """Return '0,1,2' as numbers; None for None. Raises ConfigError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {text!r} is not a list of numbers; write it as 0,1,2.")
    return [int(part) for part in parts]


def notices(planned: Experiment) -> list[str]:
    """Return what you should know before the runs begin."""
    arms, seeds = len(planned.config.arms), len(planned.seeds)
    shared = f", branching from {len(planned.warm_starts)} warm starts" if planned.warm_starts else ""
    lines = [f"{planned.name}: {arms} arms x {seeds} seeds of {planned.budget_tokens:,} tokens{shared}"]
    if planned.budget_tokens != planned.config.budget_tokens:
        lines.append(f"The experiment's own budget is {planned.config.budget_tokens:,} tokens; --set changed it.")
    lines += [f"--set {key} does not reach {', '.join(arms)}." for key, arms in planned.unreached.items()]
    return lines


def print_comparison(console: Console, summary: ComparisonSummary, *, seconds: float) -> None:
    """Print the table, the differences, and the places of everything."""
    from relora_train.experiments.comparison import arm_cells, arm_header
    from relora_train.reports.text import signed_estimate_text

    data = summary.comparison
    made = table(*arm_header(data))
    for row in data.arms:
        add_row(made, *arm_cells(data, row))
    console.print()
    console.print(made, highlight=False)
    judged, headline = data.measures.judged, data.measures.headline
    shown = list(dict.fromkeys((LOSS, headline)))
    paired = table(f"less {data.label(data.reference)}", *(measure.name for measure in shown), "pairs")
    for each in data.differences:
        score = each.score(judged)
        if each.arm != data.reference and score is not None:
            differences = [signed_estimate_text(each.score(measure)) for measure in shown]
            add_row(paired, data.label(each.arm), *differences, str(score.count))
    if paired.row_count:
        console.print()
        console.print(paired, highlight=False)
    console.print()
    closing = [f"Report: {place(summary.html_uri)}", f"JSON:   {place(summary.json_uri)}"]
    if summary.reused:
        closing.append(f"Reused: {summary.reused} of {len(data.runs)} runs")
    closing.append(f"Experiment {data.experiment} finished in {duration(seconds)}.")
    for line in closing:
        console.print(Text(line), soft_wrap=True, highlight=False)


def print_measured(console: Console, summary: MeasuredSummary, *, seconds: float) -> None:
    """Print the tables of an experiment that trains no runs, and the places of everything."""
    for each in summary.measured.tables:
        made = table(*each.header, title=each.title)
        for row in each.rows:
            add_row(made, *row)
        console.print()
        console.print(made, highlight=False)
        console.print(Text(each.note, style="dim"), highlight=False)
    console.print()
    for line in (
        summary.measured.headline,
        f"Report: {place(summary.html_uri)}",
        f"JSON:   {place(summary.json_uri)}",
        f"Experiment {summary.experiment} finished in {duration(seconds)}.",
    ):
        console.print(Text(line), soft_wrap=True, highlight=False)
