"""Scores and results of a run or an experiment as people read them."""

import math

from relora_train.reports.run_data import RunData, Scores, StageRow
from relora_train.reports.statistics import Estimate
from relora_train.settings.objectives import Measure
from relora_train.text import MISSING, count, decimal


def change(before: float | None, after: float | None) -> str:
    """Return '−12.3 %' from before to after; empty where one is missing, zero or not finite."""
    if before is None or after is None or not before or not math.isfinite(before) or not math.isfinite(after):
        return ""
    relative = f"{100 * (after / before - 1):+,.1f} %"
    return relative.replace("-", "−")


def score(scores: Scores, measure: Measure) -> str:
    """Return '31.70'."""
    return decimal(scores.of(measure), measure.digits)


def scores_change(row: StageRow, measure: Measure) -> str:
    """Return '45.20 → 31.70': before and after the stage; only the latter where the former is missing."""
    after = score(row.after, measure)
    return after if row.before.of(measure) is None else f"{score(row.before, measure)} → {after}"


def headline_text(data: RunData) -> str:
    """Return the run's result in one sentence."""
    last = data.stages[-1]
    first = next((row for row in data.stages if row.stage == "warm-start"), data.stages[0])
    shown = data.measures.headline
    end = f"{score(last.after, shown)} after {last.stage} (step {count(last.end_step)})"
    if first is last:
        return f"Validation {shown.name} is {end}."
    start = f"{score(first.after, shown)} after {first.stage}"
    return f"Validation {shown.name} went from {start} to {end}."


def estimate_text(value: Estimate | None) -> str:
    """Return '22.483 ± 0.031': to the second digit of the error; about four digits where there is none."""
    if value is None:
        return MISSING
    if value.standard_error is None:
        return decimal(value.mean, max(0, 3 - _exponent(value.mean))).replace("-", "−") if value.mean else "0"
    if value.standard_error == 0:
        return f"{value.mean:,.6g} ± 0".replace("-", "−")
    digits = max(0, 1 - _exponent(float(f"{value.standard_error:.1e}")))
    return f"{decimal(value.mean, digits)} ± {decimal(value.standard_error, digits)}".replace("-", "−")


def signed_estimate_text(value: Estimate | None) -> str:
    """Return the same of a difference, with its sign."""
    text = estimate_text(value)
    return f"+{text}" if value is not None and value.mean > 0 else text


def _exponent(value: float) -> int:
    """Return the power of ten: 2 for 123, −3 for 0.0012."""
    return math.floor(math.log10(abs(value)))
