"""The report of an experiment that trains no runs, in its store: HTML, figures and numbers below experiments/."""

from __future__ import annotations

from collections.abc import Mapping

from relora_train.checkpoints.layout import experiment_prefix
from relora_train.experiments.comparison_store import HTML_NAME, JSON_NAME
from relora_train.experiments.measured import Measured, MeasuredExperiment, MeasuredSummary, measured_json
from relora_train.reports.html import Html, escape, figure, note, table
from relora_train.reports.page import page
from relora_train.reports.rank_sections import Pictures
from relora_train.storage.base import ObjectStore


def render_measured(experiment: MeasuredExperiment, measured: Measured, pictures: Pictures) -> str:
    """The whole page; the same input gives the same text."""
    header = Html(
        f'<header><p class="eyebrow">ReLoRA Train · experiment {escape(experiment.name)}</p>'
        f'<h1>{escape(experiment.config.title)}</h1><p class="lede">{escape(measured.headline)}</p>'
        f'<p class="facts">{escape(measured.facts)}</p></header>'
    )
    tables = [
        (f"table-{number}", each.title, Html(table(each.header, each.rows) + note(each.note)))
        for number, each in enumerate(measured.tables, start=1)
    ]
    figures = [figure(pictures[name], *caption) for name, caption in measured.captions.items()]
    shown = [("figures", "Figures", Html("".join(figures)))] if figures else []
    return page(experiment.name, header, [*tables, *shown])


def store_measured(
    experiment: MeasuredExperiment, measured: Measured, pictures: Mapping[str, tuple[bytes, bytes]], store: ObjectStore
) -> MeasuredSummary:
    """Write the report; one of the same settings from before is replaced."""
    prefix = f"{experiment_prefix(experiment.name)}{experiment.digest}"
    files = {name: light for name, (light, _) in pictures.items()}
    files |= {
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
        lines += [f"## {each.title}", "", f"| {' | '.join(each.header)} |", f"|:--|{'--:|' * (len(each.header) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in each.rows] + ["", each.note, ""]
    return "\n".join(lines)
