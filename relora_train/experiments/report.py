"""The reports of experiments: pages, figures, Markdown, and their place experiments/<name>/<digest>/ in a store."""

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from relora_train import events
from relora_train.checkpoints.layout import experiment_prefix
from relora_train.experiments.comparison import arm_cells, arm_header, facts_line, headline, outcome_text, paper_text
from relora_train.experiments.config import TutorialExperiment
from relora_train.experiments.measured import Measured, MeasuredExperiment, MeasuredSummary, measure_throughput
from relora_train.experiments.records import ArmResult, Comparison, ComparisonSummary, CurvePoint, ScorePoint
from relora_train.reports.plot_style import ACCENT, SERIES, legend, new_figure, plain, to_png
from relora_train.reports.render import render
from relora_train.reports.statistics import Estimate, estimate
from relora_train.reports.text import estimate_text
from relora_train.settings.keys import flatten
from relora_train.settings.objectives import LOSS, Measure
from relora_train.storage.base import ObjectStore
from relora_train.text import MISSING, decimal, markdown_table

_TEMPLATES = Path(__file__).parent / "templates"
_COLOURS = (*SERIES, ACCENT, "#56b4e9", "#e69f00")
"""Okabe and Ito's, without black and, on white, yellow."""
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

Curves = dict[str, list[tuple[float, Estimate]]]
"""The mean and error over seeds of each arm by tokens, in order."""


def measure(experiment: MeasuredExperiment) -> tuple[Measured, dict[str, bytes]]:
    """Return what an experiment without runs came to, and its figures as PNG bytes by file name."""
    config = experiment.config
    if not isinstance(config, TutorialExperiment):
        return measure_throughput(config), {}
    from relora_train.experiments import tutorial  # torch

    events.emit("measuring", what=f"{len(config.seeds)} seeds of three arms", done=0, total=1)
    result = tutorial.run_tutorial(config.seeds, config.tutorial)
    pictures = {"losses.png": tutorial.losses_figure(result, config.tutorial)}
    return tutorial.measured_tutorial(result, config.tutorial), pictures


def store_measured(
    experiment: MeasuredExperiment, measured: Measured, pictures: Mapping[str, bytes], store: ObjectStore
) -> MeasuredSummary:
    """Write the report; one of the same settings from before is replaced."""
    record = {"experiment": experiment.name, "settings": experiment.config.model_dump(mode="json")}
    json_text = json.dumps(record | measured.model_dump(mode="json"), indent=1)
    named: dict[str, Any] = {"name": experiment.name, "heading": experiment.config.title}
    html = render(_TEMPLATES / "measured.html", measured=measured, pictures=pictures, **named)
    uris = _store_report(store, experiment.name, experiment.digest, html, json_text, pictures)
    return MeasuredSummary(experiment=experiment.name, title=experiment.config.title, measured=measured, **uris)


def measured_markdown(experiment: MeasuredExperiment, measured: Measured) -> str:
    """Return a heading, the result in one sentence, the tables."""
    lines = [f"# {experiment.config.title}", "", measured.headline, "", measured.facts, ""]
    for each in measured.tables:
        lines += [f"## {each.title}", "", *markdown_table(each.header, each.rows), "", each.note, ""]
    return "\n".join(lines)


def render_comparison(data: Comparison, pictures: Mapping[str, bytes]) -> str:
    """Return the whole page. pictures: PNG bytes by name."""
    sets = (f" --set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in flatten(data.overrides).items())
    command = f"relora compare {data.command_name or data.experiment} --seeds {','.join(map(str, data.seeds))}"
    band, by_trainer = "the band is one standard error.", "By the trainer, after every stage"
    training = f"Mean over seeds in each of 120 shares of the tokens; {band} The first steps may lie above the axis."
    captions = {
        "training_loss.png": ("Training loss", training),
        "validation_loss.png": ("Validation loss", f"{by_trainer}, on fewer sequences than the table; {band}"),
        "validation_score.png": (f"Validation {data.trained_by.headline.name}", f"{by_trainer}; {band}"),
    }
    return render(
        _TEMPLATES / "comparison.html",
        filters={
            "arm_cells": lambda row, data: arm_cells(data, row),
            "arm_header": arm_header,
            "arm_label": lambda arm, data: data.label(arm),
            "better_or_worse": _better_or_worse,
            "outcome": outcome_text,
            "settings_text": lambda sets: " · ".join(f"{key} = {value}" for key, value in flatten(sets).items()),
            "verdict": _verdict,
        },
        data=data,
        pictures=pictures,
        captions=captions,
        loss=LOSS,
        lede=headline(data),
        facts=facts_line(data),
        papers=_beside_the_paper(data),
        command=command + "".join(sets),
        versions=next((run.versions for run in data.runs if run.versions), {}),
    )


def store_comparison(data: Comparison, store: ObjectStore, *, reused: int) -> ComparisonSummary:
    """Write the report; one of the same arms from before, with fewer seeds or more, is replaced."""
    pictures = draw_comparison(data)
    html, json_text = render_comparison(data, pictures), data.model_dump_json(indent=1)
    uris = _store_report(store, data.experiment, data.digest, html, json_text, pictures)
    return ComparisonSummary(comparison=data, reused=reused, **uris)


def _store_report(
    store: ObjectStore, experiment: str, digest: str, html: str, json_text: str, pictures: Mapping[str, bytes]
) -> dict[str, Any]:
    """Write a report and return the URIs under their names in a summary."""
    prefix = f"{experiment_prefix(experiment)}{digest}"
    texts = {"comparison.json": f"{json_text}\n".encode(), "report.html": html.encode()}
    for name, content in {**pictures, **texts}.items():
        store.put_bytes(f"{prefix}/{name}", content)
    return {
        "html_uri": f"{store.uri}/{prefix}/report.html",
        "json_uri": f"{store.uri}/{prefix}/comparison.json",
        "picture_uris": tuple(f"{store.uri}/{prefix}/{name}" for name in pictures),
    }


def _better_or_worse(value: Estimate, measure: Measure) -> str:
    return "better" if (value.mean > 0) == measure.higher_is_better else "worse"


def _verdict(value: Estimate | None, measure: Measure) -> str:
    if value is None:
        return "no pair finished"
    if value.standard_error is None:
        return "one pair: no error"
    if value.count < 3:
        return "too few pairs to tell"
    return _better_or_worse(value, measure) if value.differs_from_zero() else "not told apart"


def _beside_the_paper(data: Comparison) -> list[tuple[str, ...]]:
    """Return arm, the paper's number, its ratio to the reference, ours, its ratio; nothing where the paper has none."""
    if all(row.paper is None for row in data.arms):
        return []
    reference = next(row for row in data.arms if row.arm == data.reference)

    def mean(row: ArmResult) -> float | None:
        score = row.score(data.measures.headline)
        return score.mean if score else None

    def ratio(value: object, base: object) -> str:
        return decimal(value / base, 3) if isinstance(value, float) and isinstance(base, float) and base else MISSING

    return [
        (
            row.label,
            paper_text(row.paper),
            ratio(row.paper, reference.paper),
            outcome_text(row) or estimate_text(row.score(data.measures.headline)),
            ratio(mean(row), mean(reference)),
        )
        for row in data.arms
    ]


def draw_comparison(data: Comparison) -> dict[str, bytes]:
    """PNG bytes by file name, in the order of the report; a plot without data is left out."""
    named = [("training_loss.png", "training", 3.9), ("validation_loss.png", "validation", 3.6)]
    if data.trained_by.judged != LOSS:  # else the loss says it all
        named.append(("validation_score.png", "scored", 3.6))
    return {name: _draw(data, found, which, height) for name, which, height in named if (found := _curves(data, which))}


def _curves(data: Comparison, which: str) -> Curves:
    found: Curves = {}
    for arm in data.arms:
        by_tokens: dict[float, list[float]] = {}
        for run in data.runs:
            points: Sequence[CurvePoint | ScorePoint] = getattr(run, which)
            for point in points if run.arm == arm.arm else ():
                value = point.loss if isinstance(point, CurvePoint) else point.score
                by_tokens.setdefault(point.tokens, []).append(value)
        curve = [(tokens, mean) for tokens in sorted(by_tokens) if (mean := estimate(by_tokens[tokens])) is not None]
        if curve:
            found[arm.arm] = curve
    return found


def _draw(data: Comparison, curves: Curves, which: str, height: float) -> bytes:
    figure, grid = new_figure(height)
    axes = grid[0, 0]
    looks = itertools.cycle(itertools.product(_DASHES, _COLOURS))
    style = {arm.arm: look for arm, look in zip(data.arms, looks, strict=False)}
    for arm, curve in curves.items():
        dashes, colour = style[arm]
        x, mean, error = np.array([(tokens, point.mean, point.standard_error or 0.0) for tokens, point in curve]).T
        marker = {"marker": "o", "markersize": 3.6} if which != "training" else {}
        axes.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.6, label=plain(data.label(arm)), **marker)
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.18, linewidth=0)
    axes.set_xlim(0, data.budget_tokens * 1.035)
    # The first fifth of the tokens, in which all arms move alike, may lie beyond the axis.
    later = [point.mean for curve in curves.values() for tokens, point in curve if tokens > data.budget_tokens / 5]
    if later and math.isfinite(max(later)):
        margin = 0.06 * max(max(later) - min(later), 1e-6)
        axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
    unit, name = next(((u, n) for u, n in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if data.budget_tokens >= 2 * u), (1, ""))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:,g}{name if value else ''}"))
    rises = which == "scored" and data.trained_by.judged.higher_is_better
    legend(axes, columns=2 if len(curves) > 4 else 1, place="lower right" if rises else "upper right")
    return to_png(figure, dpi=160)
