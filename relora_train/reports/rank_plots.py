"""The figures of a rank analysis: spectra of the total update, and its growth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from relora_train.reports.plot_style import (
    ACCENT,
    MUTED,
    SERIES,
    TEXT,
    legend,
    log_scale,
    new_figure,
    plain,
)
from relora_train.reports.ranks.cycles import CycleHistory, LayerGrowth
from relora_train.reports.ranks.layers import block_of, kind_of
from relora_train.reports.ranks.measures import PAPER_THRESHOLD, LayerSpectrum, by_kind

MAX_PANELS = 8
_BOUND_FITS = 2.5  # times the highest curve: what the rank can be at most is drawn in full up to there


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
    groups: dict[str, list[LayerGrowth]] = {}
    for layer in history.growth:
        groups.setdefault(kind_of(layer.name), []).append(layer)
    # Kinds are told apart by colour, then by line and marker.
    looks = [(colour, *line) for line in (("-", "o"), ("--", "s")) for colour in (*SERIES, ACCENT)]
    for axes, title, value in measures:
        highest = 0.0
        for (kind, layers), (colour, line, marker) in zip(groups.items(), looks, strict=False):  # at most MAX_PANELS
            means = np.mean([[value(spectrum) for spectrum in layer.spectra] for layer in layers], axis=0)
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
