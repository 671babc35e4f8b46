"""The figures of a comparison, as PNG bytes: losses and scores by tokens, a line an arm, a band of one standard error.

The same data always gives the same bytes. Drawn as the figures of a run are: see plots.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from relora_train.experiments.records import Comparison, CurvePoint, ScorePoint
from relora_train.reports.plot_style import ACCENT, SERIES, legend, new_figure, plain, to_png
from relora_train.reports.statistics import Estimate, estimate
from relora_train.settings.measures import LOSS

_COLOURS = (*SERIES, ACCENT, "#56b4e9", "#e69f00")
"""Okabe and Ito's, without black and, on white, yellow."""
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

Curves = dict[str, list[tuple[float, Estimate]]]
"""Of each arm the mean and error over seeds by tokens, in order."""


def draw_comparison(data: Comparison) -> dict[str, bytes]:
    """PNG bytes by file name, in the order of the report; a plot without data is left out."""
    named = [("training_loss.png", "training", 3.9), ("validation_loss.png", "validation", 3.6)]
    if data.measures.judged != LOSS:  # else the loss says it all
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
    rises = which == "scored" and data.measures.judged.higher_is_better
    legend(axes, columns=2 if len(curves) > 4 else 1, place="lower right" if rises else "upper right")
    return to_png(figure, dpi=160)
