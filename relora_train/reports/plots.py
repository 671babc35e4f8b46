"""The figures of a report, as PNG bytes: the same data always gives the same bytes.

Drawn through matplotlib's object-oriented API on the Agg canvas: no global state, safe in any thread. Curves of more
than MAX_POINTS records are thinned by `plot_style.downsample`, which keeps every peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from relora_train.reports.plot_style import (
    BACKGROUND,
    MAX_STAGE_LABELS,
    SERIES,
    TEXT,
    Floats,
    compact_numbers,
    curve,
    legend,
    log_scale,
    mark_stages,
    new_figure,
    smoothed_curve,
    to_png,
)
from relora_train.reports.rank_plots import rank_figures
from relora_train.reports.run_data import RunData

OVERVIEW_BYTES = 44_000  # below 60 kB as a data URL
_REPORT_DPI = 160


def draw_plots(data: RunData) -> dict[str, bytes]:
    """Return PNG bytes by file name, in the order of the report; a plot without data is left out."""
    recorded = len(data.train) > 0
    low_rank = bool(np.isfinite(data.train["lora_A_grad_norm"]).any())
    scored = any(points.size for points in _scores(data))
    by_step: tuple[tuple[str, bool, float, Callable[[Any, RunData], None]], ...] = (
        ("loss.png", recorded, 3.7, _draw_loss),
        ("learning_rate.png", recorded, 2.4, _draw_learning_rate),
        (score_plot_name(data), scored, 3.0, _draw_scores),
        ("gradient_norm.png", recorded and low_rank, 2.8, _draw_gradient_norm),
        ("throughput.png", recorded, 2.3, _draw_throughput),
    )
    figures = {}
    for name, wanted, height, draw in by_step:
        if wanted:
            figures[name], grid = new_figure(height, titled=draw is _draw_loss)
            grid[0, 0].set_xlabel("step")
            draw(grid[0, 0], data)
    ranks = [row.rank for row in data.stages if row.rank is not None]
    cycle_rank, total_rank = (ranks[-1], sum(ranks)) if ranks else (None, None)
    figures |= rank_figures(data.spectra, data.history, cycle_rank=cycle_rank, total_rank=total_rank)
    return {name: to_png(figure, dpi=_REPORT_DPI) for name, figure in figures.items()}


def score_plot_name(data: RunData) -> str:
    """Return 'perplexity.png', where that is what the run is scored by."""
    return f"{data.measures.headline.name}.png"


def overview_png(data: RunData) -> bytes:
    """Draw loss, learning rate and validation score in one small figure: at most OVERVIEW_BYTES, for a data URL."""
    figure, grid = new_figure(6.4, rows=3, titled=True, sharex=True, height_ratios=(3, 1.4, 2))
    figure.subplots_adjust(hspace=0.14)
    upper, middle, lower = grid.flat
    _draw_loss(upper, data)
    _draw_learning_rate(middle, data)
    _draw_scores(lower, data)
    scored = f"Validation {data.measures.headline.name}"
    for axes, title in ((upper, "Training loss"), (middle, "Learning rate"), (lower, scored)):
        x, y, side = (0.995, 0.88, "right") if axes is middle else (0.008, 0.05, "left")  # where curves are not
        box = {"facecolor": BACKGROUND, "edgecolor": "none", "alpha": 0.8, "pad": 2}
        axes.annotate(title, (x, y), xycoords="axes fraction", ha=side, va="center", fontsize=9.5, bbox=box)
    for axes in (upper, middle):
        axes.tick_params(labelbottom=False)
    lower.set_xlabel("step")
    sizes = (to_png(figure, dpi=dpi) for dpi in (110, 96, 80, 64, 48))
    return next(png for png in sizes if len(png) <= OVERVIEW_BYTES)


def _draw_loss(axes: Any, data: RunData) -> None:
    """Draw the records faint, and their running mean within each stage strong."""
    steps, loss = data.train.step, data.train["loss"]
    mark_stages(axes, data.stages, labels=True)
    smoothed_curve(axes, steps, loss, data.stages, SERIES[0])
    highest = loss_ceiling(data)
    if highest is not None:
        lowest = float(np.min(loss[np.isfinite(loss)]))
        axes.set_ylim(lowest - 0.08 * (highest - lowest), highest)
    bad = steps[~np.isfinite(loss)]
    if bad.size:
        axes.plot(bad, np.full(bad.size, 0.03), "x", color=SERIES[1], transform=axes.get_xaxis_transform())


def loss_ceiling(data: RunData) -> float | None:
    """Return the end of the loss axis, or None to show all.

    A new model's first twentieth of steps would flatten the rest, so it may lie above. A later spike is always inside.
    """
    first, last = data.stages[0].start_step, data.stages[-1].end_step
    finite = np.isfinite(data.train["loss"])
    later = data.train["loss"][finite & (data.train.step > first + (last - first) / 20)]
    if first > 0 or later.size < 20:
        return None
    return float(later.max() + 0.08 * (later.max() - later.min()))


def _draw_learning_rate(axes: Any, data: RunData) -> None:
    mark_stages(axes, data.stages)
    curve(axes, data.train.step, data.train["learning_rate"], SERIES[0], width=1.3)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
    )


def _draw_throughput(axes: Any, data: RunData) -> None:
    mark_stages(axes, data.stages)
    smoothed_curve(axes, data.train.step, data.train["tokens_per_second"], data.stages, SERIES[0])
    axes.set_ylim(bottom=0)
    compact_numbers(axes.yaxis)


def _draw_gradient_norm(axes: Any, data: RunData) -> None:
    mark_stages(axes, data.stages)
    named = (("grad_norm", "all"), ("lora_A_grad_norm", "A"), ("lora_B_grad_norm", "B"))
    for (name, label), colour in zip(named, SERIES, strict=True):
        values = np.where(data.train[name] > 0, data.train[name], np.nan)
        smoothed_curve(axes, data.train.step, values, data.stages, colour, label=label)
    log_scale(axes.yaxis, axes)
    legend(axes)


def _scores(data: RunData) -> tuple[Floats, Floats, Floats]:
    """Return (points, 2) of step and finite score: before each stage, after each stage, by the evaluation task."""
    measure = data.measures.headline
    before = [(row.start_step, row.before.of(measure)) for row in data.stages]
    after = [(row.end_step, row.after.of(measure)) for row in data.stages]
    task = [(item.step, item.scores.of(measure)) for item in data.evaluations]
    finite = (
        [(step, value) for step, value in points if value is not None and math.isfinite(value)]
        for points in (before, after, task)
    )
    first, second, third = (np.array(points, dtype=np.float64).reshape(-1, 2) for points in finite)
    return first, second, third


def _draw_scores(axes: Any, data: RunData) -> None:
    mark_stages(axes, data.stages)
    before, after, task = _scores(data)
    # The untrained model's perplexity, about the vocabulary's size, would flatten everything that is of interest.
    ceiling = 4 * float(np.max(after[:, 1], initial=0.0)) or math.inf
    before = before[before[:, 1] <= ceiling]
    drawn: tuple[tuple[str, Floats, str, dict[str, Any]], ...] = (
        ("before the stage", before, "o", {"color": SERIES[1], "markersize": 7.5, "markerfacecolor": "none"}),
        ("after the stage", after, "o-", {"color": SERIES[0], "markersize": 4.5, "linewidth": 1.4}),
        ("evaluation task", task, "D", {"color": SERIES[2], "markersize": 4.5}),
    )
    for label, points, marker, look in drawn:
        if points.size:
            axes.plot(*points.T, marker, label=label, **look)
    digits = max(1, data.measures.headline.digits - 1)
    offset = -14 if data.measures.headline.higher_is_better else 8  # on the side where no curve comes from
    for step, value in after if len(after) <= MAX_STAGE_LABELS else after[-1:]:
        place = {"xytext": (0, offset), "textcoords": "offset points", "ha": "center", "color": TEXT}
        axes.annotate(f"{value:,.{digits}f}", (step, value), fontsize=8.5, **place)
    axes.margins(y=0.25)
    compact_numbers(axes.yaxis)
    legend(axes)
