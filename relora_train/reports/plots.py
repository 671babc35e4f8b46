"""The figures of a report, as PNG bytes: the same data always gives the same bytes.

Drawn through matplotlib's object-oriented API on the Agg canvas: no global state, safe in any thread. Curves of more
than MAX_POINTS records are thinned by `plot_style.downsample`, which keeps every peak.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from relora_train.reports.plot_style import (
    ACCENT,
    BACKGROUND,
    MAX_STAGE_LABELS,
    MUTED,
    SERIES,
    TEXT,
    Floats,
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
from relora_train.reports.ranks.cycles import CycleHistory
from relora_train.reports.ranks.layers import block_of, kind_of
from relora_train.reports.ranks.measures import PAPER_THRESHOLD, LayerSpectrum, by_kind
from relora_train.reports.run_data import RunData

OVERVIEW_BYTES = 44_000  # below 60 kB as a data URL
_REPORT_DPI = 160
MAX_PANELS = 8
_BOUND_FITS = 2.5  # times the highest curve: what the rank can be at most is drawn in full up to there


def draw_plots(data: RunData) -> dict[str, bytes]:
    """Return PNG bytes by file name: the loss, and what is known of the ranks; a plot without data is left out."""
    figures = {}
    if len(data.train):
        figures["loss.png"], grid = new_figure(3.7, titled=True)
        grid[0, 0].set_xlabel("step")
        _draw_loss(grid[0, 0], data)
    ranks = [row.rank for row in data.stages if row.rank is not None]
    cycle_rank, total_rank = (ranks[-1], sum(ranks)) if ranks else (None, None)
    figures |= rank_figures(data.spectra, data.history, cycle_rank=cycle_rank, total_rank=total_rank)
    return {name: to_png(figure, dpi=_REPORT_DPI) for name, figure in figures.items()}


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
    curve(axes, data.rates.steps, data.rates.rates, SERIES[0], width=1.3)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
    )


def score_points(data: RunData) -> tuple[Floats, Floats, Floats]:
    """Return (points, 2) of step and finite score: before each stage, after each stage, by the evaluation task.

    Scores before a stage of more than four times the worst one after a stage are left out: the untrained model's
    perplexity, about the vocabulary's size, would flatten all that is of interest.
    """
    measure = data.measures.headline
    before = [(row.start_step, row.before.of(measure)) for row in data.stages]
    after = [(row.end_step, row.after.of(measure)) for row in data.stages]
    task = [(item.step, item.scores.of(measure)) for item in data.evaluations]
    finite = (
        [(step, value) for step, value in points if value is not None and math.isfinite(value)]
        for points in (before, after, task)
    )
    first, second, third = (np.array(points, dtype=np.float64).reshape(-1, 2) for points in finite)
    ceiling = 4 * float(np.max(second[:, 1], initial=0.0)) or math.inf
    return first[first[:, 1] <= ceiling], second, third


def _draw_scores(axes: Any, data: RunData) -> None:
    mark_stages(axes, data.stages)
    before, after, task = score_points(data)
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


def rank_figures(
    spectra: Sequence[LayerSpectrum], history: CycleHistory | None, *, cycle_rank: int | None, total_rank: int | None
) -> dict[str, Figure]:
    """Return the figures that there is something to draw in, by file name."""
    figures = {}
    if spectra:
        figures["spectra.png"] = spectra_figure(spectra, cycle_rank=cycle_rank, total_rank=total_rank)
    if history is not None and len(history.growth_stages) > 1:
        figures["growth.png"] = growth_figure(history)
    return figures


def spectra_figure(spectra: Sequence[LayerSpectrum], *, cycle_rank: int | None, total_rank: int | None) -> Figure:
    """Draw the singular values of the total update, one panel a kind of layer (at most MAX_PANELS).

    One line a layer; of more than three all faint, and their mean strong. Vertical lines: the rank of one cycle, and
    the sum of the ranks merged. Values that rounding could have made are not drawn.
    """
    shown = list(by_kind(spectra).items())[:MAX_PANELS]
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, grid = new_figure(2.6 * rows + 0.4, rows=rows, columns=columns, titled=True, sharey=True)
    figure.subplots_adjust(wspace=0.06, hspace=0.32)
    several = total_rank is not None and total_rank != cycle_rank
    marks = [(cycle_rank, "rank of one cycle" if several else "rank", "--")]
    marks += [(total_rank, "sum of ranks", ":")] if several else []
    for axes, ((kind, _), layers) in zip(grid.flat, shown, strict=False):
        _draw_spectra(axes, layers)
        for rank, label, style in marks:
            if rank is not None and rank <= len(layers[0].values):
                axes.axvline(rank + 0.5, color=ACCENT, linestyle=style, linewidth=1.4, label=f"{label}, {rank:,}")
        axes.set_title(plain(kind), fontsize=9.5, color=TEXT, loc="left")
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("index of the singular value")
    first = shown[0][1][0]
    full = first.numerical_rank > 0.6 * len(first.values)
    legend(grid.flat[0], columns=1, place="lower left" if full else "upper right")  # where the curves are not
    return figure


def _draw_spectra(axes: Any, layers: Sequence[LayerSpectrum]) -> None:
    index = np.arange(1, len(layers[0].values) + 1)
    few = len(layers) <= len(SERIES)
    for i, layer in enumerate(layers):
        values = np.where(layer.values > layer.tolerance, layer.values, np.nan)
        if few:
            block = block_of(layer.name)
            label = f"block {block}" if block else plain(layer.name)
            axes.plot(index, values, color=SERIES[i], linewidth=1.5, label=label)
        else:
            axes.plot(index, values, color=SERIES[0], linewidth=0.6, alpha=0.35)
    if not few:
        mean = np.mean([layer.values for layer in layers], axis=0)
        drawn = np.where(mean > max(layer.tolerance for layer in layers), mean, np.nan)
        axes.plot(index, drawn, color=SERIES[1], linewidth=1.7, label=f"mean of {len(layers)} blocks")
    axes.axhline(PAPER_THRESHOLD, color=MUTED, linewidth=0.7)
    log_scale(axes.yaxis, axes)
    axes.set_xlim(0, len(index) * 1.02)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def growth_figure(history: CycleHistory) -> Figure:
    """Draw effective rank, and singular values of 0.1 or more, by cycle; a line is the mean of one kind of layer.

    Dotted: what the rank can be at most, as far as it fits.
    """
    figure, grid = new_figure(3.5, columns=2, titled=True)
    figure.subplots_adjust(wspace=0.12, bottom=0.22)
    places = np.arange(1, len(history.growth_stages) + 1)
    measures: tuple[tuple[Any, str, Callable[[LayerSpectrum], float]], ...] = (
        (grid[0, 0], "effective rank", lambda spectrum: spectrum.effective_rank),
        (grid[0, 1], "singular values of 0.1 or more", lambda spectrum: spectrum.at_threshold),
    )
    groups: dict[str, list[tuple[LayerSpectrum, ...]]] = {}
    for layer in history.growth:
        groups.setdefault(kind_of(layer[0].name), []).append(layer)
    # Kinds are told apart by colour, then by line and marker.
    looks = [(colour, *line) for line in (("-", "o"), ("--", "s")) for colour in (*SERIES, ACCENT)]
    for axes, title, value in measures:
        highest = 0.0
        for (kind, layers), (colour, line, marker) in zip(groups.items(), looks, strict=False):  # at most MAX_PANELS
            means = np.mean([[value(spectrum) for spectrum in layer] for layer in layers], axis=0)
            highest = max(highest, float(np.max(means)))
            look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.5}
            axes.plot(places, means, label=plain(kind), **look)
        bound = [math.nan if rank is None else rank for rank in history.growth_ranks]
        axes.plot(places, bound, color=MUTED, linestyle=":", linewidth=1.4, label="sum of ranks")
        axes.set_ylim(0, max(1.0, *(1.06 * top for top in (highest, bound[-1]) if top <= _BOUND_FITS * highest)))
        axes.set_title(title, fontsize=9.5, color=TEXT, loc="left")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_ticks(places, [plain(name) for name in history.growth_stages])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=5, fontsize=8.5, labelcolor=TEXT, frameon=False, borderpad=0.4
    )
    return figure
