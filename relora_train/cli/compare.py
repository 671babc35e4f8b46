"""`relora compare` and `relora experiments`. Imports no torch and no Prefect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from relora_train.cli.output import tell
from relora_train.cli.precheck import check_inputs
from relora_train.cli.run import run_shown
from relora_train.cli.summary import place
from relora_train.cli.tables import add_row, table
from relora_train.errors import ConfigError
from relora_train.experiments.experiment import Experiment, list_experiments, load_experiment
from relora_train.experiments.measured import MeasuredSummary, is_measured, load_measured
from relora_train.runs.model_check import check_settings
from relora_train.runs.run import default_store_uri
from relora_train.settings import load as profiles
from relora_train.settings.measures import LOSS
from relora_train.storage.opening import open_store
from relora_train.text import duration

if TYPE_CHECKING:
    from relora_train.experiments.records import ComparisonSummary


def parse_seeds(text: str | None) -> list[int] | None:
    """'0,1,2' as numbers; None for none. Raises ConfigError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {text!r} is not a list of numbers; write it as 0,1,2.")
    return [int(part) for part in parts]


def run_experiment(
    name: str,
    sets: Sequence[str],
    *,
    seeds: list[int] | None,
    store_uri: str | None,
    deployment: str | None,
    console: Console,
    verbose: bool,
) -> ComparisonSummary | MeasuredSummary:
    """Run the flow `compare` and return its summary; what can be refused is refused before anything starts.

    Raises the library's own errors, TrainerInterruptedError after Ctrl-C; exits with 143 after SIGTERM.
    """
    if deployment is not None and not deployment.startswith("pretrain/"):
        raise ConfigError(
            f"--deployment {deployment!r} is no deployment of the flow pretrain: write it as pretrain/NAME."
        )
    overrides = dict(profiles.parse_override(text) for text in sets)
    without_runs = is_measured(name)
    if without_runs:
        load_measured(name, overrides, seeds)
    planned = None if without_runs else load_experiment(name, overrides, seeds)
    store = open_store(store_uri or default_store_uri())
    store.preflight()
    if planned is not None:
        for run in planned.runs:
            check_settings(run.profile)
        check_inputs(planned.runs[0].profile)
        for notice in notices(planned):
            tell(notice)
    parameters: dict[str, Any] = {
        "experiment": name,
        "overrides": overrides,
        "seeds": seeds,
        "store": store.uri,
        "deployment": deployment,
    }
    summary: ComparisonSummary | MeasuredSummary = run_shown(
        "compare", parameters, (), console=console, verbose=verbose
    )
    return summary


def notices(planned: Experiment) -> list[str]:
    """What is to be known before the runs begin."""
    arms, seeds = len(planned.config.arms), len(planned.seeds)
    shared = f", branching from {len(planned.warm_starts)} warm starts" if planned.warm_starts else ""
    lines = [f"{planned.name}: {arms} arms x {seeds} seeds of {planned.budget_tokens:,} tokens{shared}"]
    if planned.budget_tokens != planned.config.budget_tokens:
        lines.append(f"The experiment's own budget is {planned.config.budget_tokens:,} tokens; --set changed it.")
    lines += [f"--set {key} does not reach {', '.join(arms)}." for key, arms in planned.unreached.items()]
    return lines


def print_comparison(console: Console, summary: ComparisonSummary, *, seconds: float) -> None:
    """The table, the differences, and where everything lies."""
    from relora_train.experiments.comparison_text import arm_cells, arm_header
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
    """The tables of an experiment that trains no runs, and where everything lies."""
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


def describe_experiments() -> list[dict[str, Any]]:
    """Name, title, base profile, arms and time of every shipped experiment."""
    described: list[dict[str, Any]] = []
    for path in list_experiments():
        if is_measured(path.stem):
            config = load_measured(path.stem).config
            about: dict[str, Any] = {"name": path.stem, "title": config.title, "profile": None, "arms": [], "seeds": []}
            described.append({**about, "time": _time(path), "path": str(path)})
            continue
        planned = load_experiment(path.stem)
        described.append(
            {
                "name": planned.name,
                "title": planned.config.title,
                "profile": planned.config.profile,
                "arms": list(planned.config.arms),
                "seeds": list(planned.config.seeds),
                "time": _time(path),
                "path": str(path),
            }
        )
    return described


def print_experiments(console: Console, described: Sequence[dict[str, Any]]) -> None:
    """One line an experiment."""
    made = table("experiment", "arms", "title", left=("title",))
    for item in described:
        add_row(made, item["name"], str(len(item["arms"])) if item["arms"] else "–", item["title"])
    console.print(made, highlight=False)


def _time(path: Path) -> str:
    """What the header says of it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.partition("# Time:")[2].strip() for line in lines if line.startswith("# Time:")), "")
