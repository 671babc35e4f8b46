"""The charts of a report's training section: one of each curve of plots.py, over the same steps."""

from collections.abc import Sequence

import numpy as np

from relora_train.reports.charts import Chart, Curve
from relora_train.reports.plot_style import MAX_POINTS, Floats, running_mean
from relora_train.reports.plots import loss_ceiling, score_points
from relora_train.reports.run_data import RunData
from relora_train.text import count, decimal


def training_charts(data: RunData) -> list[Chart]:
    """Return the charts that there is something to draw in, in the order of the report."""
    train, measure = data.train, data.measures.headline
    bad = train.step[~np.isfinite(train["loss"])] if len(train) else np.array([], dtype=np.int64)
    thinned = (
        f" Of {count(len(train))} records at most {count(MAX_POINTS)} are drawn; each peak is kept."
        if len(train) > MAX_POINTS
        else ""
    )
    ceiling = loss_ceiling(data) if len(train) else None
    hidden = ceiling is not None and bool((train["loss"] > ceiling).any())
    loss = (
        "Faint: each record. Strong: running mean in a stage.",
        " Dashed lines are merges." if data.merges else "",
        f" The first steps lie above {decimal(ceiling, 2)}, where the axis ends." if hidden else "",
        f" Records that are not finite, marked ×: {count(len(bad))}." if len(bad) else "",
        thinned,
    )
    scored = f"Validation {measure.name}"
    scores = [
        Curve(label, points[:, 0].astype(np.int64), points[:, 1], look)
        for points, label, look in zip(
            score_points(data),
            ("before the stage", "after the stage", "final evaluation"),
            ("c1 points hollow", "c0 points", "c2 points"),
            strict=True,
        )
        if len(points)
    ]
    after = [curve for curve in scores if "c0" in curve.look]
    norms = [
        Curve(label, train.step, train[name], look)
        for name, label, look in (
            ("grad_norm", "all", "c0"), ("lora_A_grad_norm", "A", "c1 thick"), ("lora_B_grad_norm", "B", "c2 thick"),
        )
        if len(train) and np.isfinite(train[name]).any()
    ]  # fmt: skip
    steps, rates, source = data.rates
    charts = [
        Chart("Training loss", "".join(loss), smoothed(data, "loss", "loss"), 320,
              highest=ceiling, marks=bad.tolist()),
        Chart("Learning rate", source, [Curve("rate", steps, rates, "c0")], 200, lowest=0.0),
        Chart(scored, "Hollow: before a stage; scores far above the rest are left out.",
              [*(Curve("", curve.x, curve.y, "c0 faint") for curve in after), *scores]),
        Chart("Gradient norm", "All trained parameters, and A and B in a cycle's first steps.",
              norms, 220, logarithmic=True),
        Chart("Tokens per second", "While training; evaluation and merges are not counted.",
              smoothed(data, "tokens_per_second", "tokens/s"), 200, lowest=0.0),
    ]  # fmt: skip
    return [chart for chart in charts if any(np.isfinite(curve.y).any() for curve in chart.curves)]


def smoothed(data: RunData, name: str, label: str, look: str = "c0") -> Sequence[Curve]:
    """Return a number of the training records as they are, faint, and their running mean within each stage."""
    steps, values = data.train.step, data.train[name]
    means: list[Floats] = []
    places = []
    for row in data.stages:  # a merge is never smoothed over: the line is interrupted there
        inside = (steps > row.start_step) & (steps <= row.end_step)
        if inside.any():
            means += [running_mean(values[inside]), np.array([np.nan])]
            places += [steps[inside], np.array([row.end_step])]
    if not places:
        return []
    mean = Curve(label, np.concatenate(places), np.concatenate(means), look)
    return [Curve("", steps, values, f"{look} faint"), mean]
