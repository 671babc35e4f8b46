"""Measure an experiment that trains no runs, by its kind, and report it."""

from __future__ import annotations

from collections.abc import Mapping

from relora_train import events
from relora_train.experiments.comparison_page import TEMPLATES
from relora_train.experiments.measured import (
    Measured,
    MeasuredExperiment,
    MeasuredSummary,
    TutorialExperiment,
    measured_json,
)
from relora_train.experiments.store import store_report
from relora_train.experiments.throughput import measure_throughput
from relora_train.reports.render import render
from relora_train.storage.base import ObjectStore
from relora_train.text import markdown_table


def measure(experiment: MeasuredExperiment) -> tuple[Measured, dict[str, bytes]]:
    """Return what the experiment came to, and its figures as PNG bytes by file name."""
    config = experiment.config
    if isinstance(config, TutorialExperiment):
        from relora_train.experiments.tutorial_report import measure_tutorial  # torch

        events.emit("measuring", what=f"{len(config.seeds)} seeds of three arms", done=0, total=1)
        return measure_tutorial(config)
    return measure_throughput(config), {}


def render_measured(experiment: MeasuredExperiment, measured: Measured, pictures: Mapping[str, bytes]) -> str:
    """Return the whole page."""
    return render(
        TEMPLATES / "measured.html",
        name=experiment.name,
        heading=experiment.config.title,
        measured=measured,
        pictures=pictures,
    )


def store_measured(
    experiment: MeasuredExperiment, measured: Measured, pictures: Mapping[str, bytes], store: ObjectStore
) -> MeasuredSummary:
    """Write the report; one of the same settings from before is replaced."""
    html, json = render_measured(experiment, measured, pictures), measured_json(experiment, measured)
    uris = store_report(store, experiment.name, experiment.digest, html=html, json=json, pictures=pictures)
    return MeasuredSummary(experiment=experiment.name, title=experiment.config.title, measured=measured, **uris)


def measured_markdown(experiment: MeasuredExperiment, measured: Measured) -> str:
    """Return a heading, the result in one sentence, the tables."""
    lines = [f"# {experiment.config.title}", "", measured.headline, "", measured.facts, ""]
    for each in measured.tables:
        lines += [f"## {each.title}", "", *markdown_table(each.header, each.rows), "", each.note, ""]
    return "\n".join(lines)
