"""The report of a comparison: the values that templates/comparison.html shows, and its place in a store."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from relora_train.experiments.comparison_plots import draw_comparison
from relora_train.experiments.comparison_text import (
    arm_cells,
    arm_header,
    facts_line,
    headline,
    outcome_text,
    paper_text,
)
from relora_train.experiments.records import ArmResult, Comparison, ComparisonSummary
from relora_train.experiments.store import store_report
from relora_train.reports.render import render
from relora_train.reports.statistics import Estimate
from relora_train.reports.text import estimate_text
from relora_train.settings.keys import flatten
from relora_train.settings.measures import LOSS, Measure
from relora_train.storage.base import ObjectStore
from relora_train.text import MISSING, decimal

TEMPLATES = Path(__file__).parent / "templates"
_BAND = "the band is one standard error."


def render_comparison(data: Comparison, pictures: Mapping[str, bytes]) -> str:
    """Return the whole page. pictures: PNG bytes by name."""
    sets = (f" --set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in flatten(data.overrides).items())
    command = f"relora compare {data.command_name or data.experiment} --seeds {','.join(map(str, data.seeds))}"
    captions = {
        "training_loss.png": (
            "Training loss",
            f"Mean over seeds in each of 120 shares of the tokens; {_BAND} The first steps may lie above the axis.",
        ),
        "validation_loss.png": (
            "Validation loss",
            f"By the trainer, after every stage, on fewer sequences than the table; {_BAND}",
        ),
        "validation_score.png": (
            f"Validation {data.measures.headline.name}",
            f"By the trainer, after every stage; {_BAND}",
        ),
    }
    return render(
        TEMPLATES / "comparison.html",
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
    html, json_text = render_comparison(data, pictures), data.model_dump_json(indent=1) + "\n"
    uris = store_report(store, data.experiment, data.digest, html=html, json=json_text, pictures=pictures)
    return ComparisonSummary(comparison=data, reused=reused, **uris)


def _better_or_worse(value: Estimate, measure: Measure) -> str:
    return "better" if (value.mean > 0) == measure.higher_is_better else "worse"


def _verdict(value: Estimate | None, measure: Measure) -> str:
    if value is None:
        return "no pair finished"
    if value.standard_error is None:
        return "one pair: no error"
    if value.count < 3:
        return "too few pairs to tell"
    if not value.differs_from_zero():
        return "not told apart"
    return _better_or_worse(value, measure)


def _beside_the_paper(data: Comparison) -> list[tuple[str, ...]]:
    """Return arm, the paper's number, its ratio to the reference, ours, its ratio; nothing where the paper has none."""
    if all(row.paper is None for row in data.arms):
        return []
    measure = data.measures.headline
    reference = next(row for row in data.arms if row.arm == data.reference)

    def mean(row: ArmResult) -> float | None:
        score = row.score(measure)
        return score.mean if score else None

    def ratio(value: object, base: object) -> str:
        return decimal(value / base, 3) if isinstance(value, float) and isinstance(base, float) and base else MISSING

    return [
        (
            row.label,
            paper_text(row.paper),
            ratio(row.paper, reference.paper),
            outcome_text(row) or estimate_text(row.score(measure)),
            ratio(mean(row), mean(reference)),
        )
        for row in data.arms
    ]
