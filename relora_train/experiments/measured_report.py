"""The report of an experiment that trains no runs, in its store: HTML, figures and numbers below experiments/."""

from __future__ import annotations

from collections.abc import Mapping

from relora_train.checkpoints.layout import experiment_prefix
from relora_train.experiments.comparison_page import TEMPLATES
from relora_train.experiments.comparison_store import HTML_NAME, JSON_NAME
from relora_train.experiments.measured import Measured, MeasuredExperiment, MeasuredSummary, measured_json
from relora_train.reports.render import render
from relora_train.storage.base import ObjectStore
from relora_train.text import markdown_table


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
    prefix = f"{experiment_prefix(experiment.name)}{experiment.digest}"
    files = {
        **pictures,
        JSON_NAME: measured_json(experiment, measured).encode(),
        HTML_NAME: render_measured(experiment, measured, pictures).encode(),
    }
    for name, content in files.items():
        store.put_bytes(f"{prefix}/{name}", content)
    return MeasuredSummary(
        experiment=experiment.name,
        title=experiment.config.title,
        measured=measured,
        html_uri=f"{store.uri}/{prefix}/{HTML_NAME}",
        json_uri=f"{store.uri}/{prefix}/{JSON_NAME}",
        picture_uris=tuple(f"{store.uri}/{prefix}/{name}" for name in pictures),
    )


def measured_markdown(experiment: MeasuredExperiment, measured: Measured) -> str:
    """A heading, the result in one sentence, the tables."""
    lines = [f"# {experiment.config.title}", "", measured.headline, "", measured.facts, ""]
    for each in measured.tables:
        lines += [f"## {each.title}", "", *markdown_table(each.header, each.rows), "", each.note, ""]
    return "\n".join(lines)
