"""The figures of a report, as PNG bytes: the same data always gives the same bytes.

Drawn through matplotlib's object-oriented API on the Agg canvas: no global state, safe in any thread. Curves of more
than MAX_POINTS records are thinned by `plot_style.downsample`, which keeps every peak.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from relora_train.analysis import PAPER_THRESHOLD, LayerSpectrum
from relora_train.reporting.plot_style import (
    LIGHT,
    MAX_STAGE_LABELS,
    Floats,
    Theme,
    compact_numbers,
    curve,
    legend,
    log_scale,
    mark_stages,
    new_figure,
    plain,
    smoothed_curve,
    to_png,
)
from relora_train.reporting.run_data import RunData, StageRow

OVERVIEW_BYTES = 44_000  # below 60 kB as a data URL
MAX_PANELS = 8
_REPORT_DPI = 160


def draw_plots(data: RunData, theme: Theme = LIGHT) -> dict[str, bytes]:
    """PNG bytes by file name, in the order of the report; a plot without data is left out."""
    recorded = len(data.train) > 0
    low_rank = bool(np.isfinite(data.train["lora_A_grad_norm"]).any())
    scored = any(points.size for points in _perplexities(data))
    plots: list[tuple[str, bool, Callable[[RunData, Theme], Figure]]] = [
        ("loss.png", recorded, loss_figure),
        ("learning_rate.png", recorded, learning_rate_figure),
        ("perplexity.png", scored, perplexity_figure),
        ("gradient_norm.png", recorded and low_rank, gradient_norm_figure),
        ("throughput.png", recorded, throughput_figure),
        ("spectra.png", bool(data.spectra), spectra_figure),
    ]
    return {name: to_png(draw(data, theme), theme, dpi=_REPORT_DPI) for name, wanted, draw in plots if wanted}


def overview_png(data: RunData) -> bytes:
    """Loss, learning rate and perplexity in one small figure: at most OVERVIEW_BYTES, for a data URL."""
    figure, grid = new_figure(LIGHT, 6.4, rows=3, titled=True, sharex=True, height_ratios=(3, 1.4, 2))
    figure.subplots_adjust(hspace=0.14)
    upper, middle, lower = grid.flat
    _draw_loss(upper, data, LIGHT)
    _draw_learning_rate(middle, data, LIGHT)
    _draw_perplexity(lower, data, LIGHT)
    for axes, title in ((upper, "Training loss"), (middle, "Learning rate"), (lower, "Validation perplexity")):
        x, y, side = (0.995, 0.88, "right") if axes is middle else (0.008, 0.05, "left")  # where curves are not
        box = {"facecolor": LIGHT.background, "edgecolor": "none", "alpha": 0.8, "pad": 2}
        axes.annotate(title, (x, y), xycoords="axes fraction", ha=side, va="center", fontsize=9.5, bbox=box)
    for axes in (upper, middle):
        axes.tick_params(labelbottom=False)
    lower.set_xlabel("step")
    sizes = (to_png(figure, LIGHT, dpi=dpi) for dpi in (110, 96, 80, 64, 48))
    return next(png for png in sizes if len(png) <= OVERVIEW_BYTES)


def loss_figure(data: RunData, theme: Theme) -> Figure:
    """Training loss by step: the records faint, their running mean within each stage strong."""
    return _figure_by_step(data, theme, 3.7, _draw_loss, titled=True)


def learning_rate_figure(data: RunData, theme: Theme) -> Figure:
    """The jagged learning rate by step."""
    return _figure_by_step(data, theme, 2.4, _draw_learning_rate)


def perplexity_figure(data: RunData, theme: Theme) -> Figure:
    """Validation perplexity of every checkpoint: by the trainer, and by the evaluation task where it ran."""
    return _figure_by_step(data, theme, 3.0, _draw_perplexity)


def gradient_norm_figure(data: RunData, theme: Theme) -> Figure:
    """Gradient norms by step, on a log scale: of all parameters, of A and of B."""
    return _figure_by_step(data, theme, 2.8, _draw_gradient_norm)


def throughput_figure(data: RunData, theme: Theme) -> Figure:
    """Tokens per second of the records by step."""
    return _figure_by_step(data, theme, 2.3, _draw_throughput)


def spectra_figure(data: RunData, theme: Theme) -> Figure:
    """Singular values of the total update, one panel a kind of layer (at most MAX_PANELS), one line a block.

    Vertical lines: the rank of one cycle, and the sum of the ranks merged. Values that rounding could have made
    are not drawn.
    """
    groups: dict[str, list[LayerSpectrum]] = {}
    for spectrum in data.spectra:
        groups.setdefault(_role(spectrum.name), []).append(spectrum)
    shown = list(groups.items())[:MAX_PANELS]
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, grid = new_figure(theme, 2.6 * rows + 0.4, rows=rows, columns=columns, titled=True, sharey=True)
    figure.subplots_adjust(wspace=0.06, hspace=0.32)
    for axes, (role, spectra) in zip(grid.flat, shown, strict=False):
        _draw_spectra(axes, spectra, data.stages, theme)
        axes.set_title(plain(role), fontsize=9.5, color=theme.text, loc="left")
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("index of the singular value")
    first = shown[0][1][0]
    full = first.numerical_rank > 0.6 * len(first.values)
    legend(grid.flat[0], theme, columns=1, place="lower left" if full else "upper right")  # where the curves are not
    return figure


def _figure_by_step(
    data: RunData, theme: Theme, height: float, draw: Callable[[Any, RunData, Theme], None], *, titled: bool = False
) -> Figure:
    figure, grid = new_figure(theme, height, titled=titled)
    axes = grid[0, 0]
    axes.set_xlabel("step")
    draw(axes, data, theme)
    return figure


def _draw_loss(axes: Any, data: RunData, theme: Theme) -> None:
    steps, loss = data.train.step, data.train["loss"]
    mark_stages(axes, data.stages, theme, labels=True)
    smoothed_curve(axes, steps, loss, data.stages, theme.series[0])
    highest = loss_ceiling(data)
    if highest is not None:
        lowest = float(np.min(loss[np.isfinite(loss)]))
        axes.set_ylim(lowest - 0.08 * (highest - lowest), highest)
    bad = steps[~np.isfinite(loss)]
    if bad.size:
        axes.plot(bad, np.full(bad.size, 0.03), "x", color=theme.series[1], transform=axes.get_xaxis_transform())


def loss_ceiling(data: RunData) -> float | None:
    """Where the loss axis ends, or None to show all: a new model's first twentieth of steps would flatten the rest.

    A later spike is always inside.
    """
    first, last = data.stages[0].start_step, data.stages[-1].end_step
    finite = np.isfinite(data.train["loss"])
    later = data.train["loss"][finite & (data.train.step > first + (last - first) / 20)]
    if first > 0 or later.size < 20:
        return None
    return float(later.max() + 0.08 * (later.max() - later.min()))


def _draw_learning_rate(axes: Any, data: RunData, theme: Theme) -> None:
    mark_stages(axes, data.stages, theme)
    curve(axes, data.train.step, data.train["learning_rate"], theme.series[0], width=1.3)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
    )


def _draw_throughput(axes: Any, data: RunData, theme: Theme) -> None:
    mark_stages(axes, data.stages, theme)
    smoothed_curve(axes, data.train.step, data.train["tokens_per_second"], data.stages, theme.series[0])
    axes.set_ylim(bottom=0)
    compact_numbers(axes.yaxis)


def _draw_gradient_norm(axes: Any, data: RunData, theme: Theme) -> None:
    mark_stages(axes, data.stages, theme)
    named = (("grad_norm", "all"), ("lora_A_grad_norm", "A"), ("lora_B_grad_norm", "B"))
    for (name, label), colour in zip(named, theme.series, strict=True):
        values = np.where(data.train[name] > 0, data.train[name], np.nan)
        smoothed_curve(axes, data.train.step, values, data.stages, colour, label=label)
    log_scale(axes.yaxis, axes)
    legend(axes, theme)


def _perplexities(data: RunData) -> tuple[Floats, Floats, Floats]:
    """(points, 2) of step and finite perplexity: before each stage, after each stage, by the evaluation task."""
    before = [(row.start_step, row.before.val_perplexity) for row in data.stages]
    after = [(row.end_step, row.after.val_perplexity) for row in data.stages]
    task = [(item.step, item.scores.val_perplexity) for item in data.evaluations]
    return _finite_points(before), _finite_points(after), _finite_points(task)


def _draw_perplexity(axes: Any, data: RunData, theme: Theme) -> None:
    mark_stages(axes, data.stages, theme)
    before, after, task = _perplexities(data)
    # The untrained model's perplexity, about the vocabulary's size, would flatten everything that is of interest.
    ceiling = 4 * float(np.max(after[:, 1], initial=0.0)) or math.inf
    before = before[before[:, 1] <= ceiling]
    named = (("before the stage", before, "o"), ("after the stage", after, "o-"), ("evaluation task", task, "D"))
    looks: tuple[dict[str, Any], ...] = (
        {"color": theme.series[1], "markersize": 7.5, "markerfacecolor": "none"},
        {"color": theme.series[0], "markersize": 4.5, "linewidth": 1.4},
        {"color": theme.series[2], "markersize": 4.5},
    )
    for (label, points, marker), look in zip(named, looks, strict=True):
        if points.size:
            axes.plot(*points.T, marker, label=label, **look)
    for step, perplexity in after if len(after) <= MAX_STAGE_LABELS else after[-1:]:
        place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "color": theme.text}
        axes.annotate(f"{perplexity:,.1f}", (step, perplexity), fontsize=8.5, **place)
    axes.margins(y=0.25)
    compact_numbers(axes.yaxis)
    legend(axes, theme)


def _draw_spectra(axes: Any, spectra: Sequence[LayerSpectrum], stages: Sequence[StageRow], theme: Theme) -> None:
    width = max(len(spectrum.values) for spectrum in spectra)
    for spectrum, colour in zip(spectra, theme.series, strict=False):
        values = np.where(spectrum.values > spectrum.tolerance, spectrum.values, np.nan)
        axes.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=1.5, label=_block(spectrum.name))
    ranks = [row.rank for row in stages if row.rank is not None]
    marks = [(ranks[-1], "rank of one cycle" if len(ranks) > 1 else "rank", "--")] if ranks else []
    if len(ranks) > 1:
        marks.append((sum(ranks), "sum of ranks", ":"))
    for rank, label, style in marks:
        if rank <= width:
            axes.axvline(rank + 0.5, color=theme.accent, linestyle=style, linewidth=1.4, label=f"{label}, {rank:,}")
    axes.axhline(PAPER_THRESHOLD, color=theme.muted, linewidth=0.7)
    log_scale(axes.yaxis, axes)
    axes.set_xlim(0, width * 1.02)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _finite_points(points: Sequence[tuple[int, float | None]]) -> Floats:
    finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    return np.array(finite, dtype=np.float64).reshape(-1, 2)


def _role(name: str) -> str:
    """'model.layers.3.mlp.up_proj.weight' -> 'mlp.up_proj'."""
    return re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")


def _block(name: str) -> str:
    """'model.layers.3.mlp.up_proj.weight' -> 'block 3'."""
    match = re.search(r"\.(\d+)\.", name)
    return f"block {match[1]}" if match else plain(name)
