"""Scores and results of a run or an experiment as people read them."""

import math

from relora_train.reports.run_data import Evaluation, RunData, Scores, StageRow
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


def final_evaluation(data: RunData) -> Evaluation | None:
    """Return the evaluation task's scores of the run's last checkpoint, or None if it has not scored it."""
    scored = [item for item in data.evaluations if item.step == data.stages[-1].end_step]
    return scored[-1] if scored else None


def headline_text(data: RunData) -> str:
    """Return the run's result in a sentence or two: the final evaluation if there is one, and where it came from."""
    last, shown, final = data.stages[-1], data.measures.headline, final_evaluation(data)
    first = next((row for row in data.stages if row.stage == "warm-start"), data.stages[0])
    scores, scored = (
        (final.scores, f" on {count(final.val_tokens)} held-out {data.measures.unit}s") if final else (last.after, "")
    )
    text = (
        f"Validation {shown.name} is {score(scores, shown)}{scored} after {last.stage} (step {count(last.end_step)})."
    )
    if first is last:
        return text
    begun = next((item.scores for item in data.evaluations if item.step == first.end_step), None)
    before = begun if final and begun else None if final else first.after
    return text if before is None else f"{text} It was {score(before, shown)} after {first.stage}."


def in_training_text(data: RunData) -> str:
    """Say how the score that training itself took at the end differs from the final one."""
    last, shown = data.stages[-1], data.measures.headline
    own = score(last.after, shown)
    if final_evaluation(data) is None:
        return (
            f"The trainer's own check at the end of {last.stage}; the evaluation task has not scored this checkpoint."
        )
    sequences = data.settings.get("evaluation", {}).get("sequences")
    on = f" on {count(sequences)} sequences" if isinstance(sequences, int) else ""
    return (
        f"Training's own check at the end of {last.stage}{on} said {own}: it reads less of the held-out part, and is "
        "what the curve and the table of stages show."
    )


def flops_text(value: float | None) -> str:
    """Return '13.4 G', '412 T': FLOP/s in thousands of thousands."""
    if value is None:
        return MISSING
    unit, name = next(
        ((unit, name) for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")) if value >= unit), (1e6, "M")
    )
    return f"{value / unit:.3g} {name}"


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
