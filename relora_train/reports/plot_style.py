"""The style of the report's figures: colours, axes, thinned and smoothed curves, PNG bytes.

Colours are Okabe and Ito's, told apart by people with any colour vision. No matplotlib global is read or changed.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray
from PIL import Image  # matplotlib draws PNG with it, so it is there

from relora_train.reports.run_data import StageRow

Floats = NDArray[np.float64]

MAX_POINTS = 2000
"""Points a curve is drawn with at most."""
MAX_STAGE_LABELS = 14
WIDTH_INCHES = 10.0
PALETTE = 256

_LEFT, _RIGHT, _BOTTOM = 0.62, 0.10, 0.45  # inches, the same for all, so that steps lie one above another

BACKGROUND, TEXT, MUTED, GRID, BAND = "#ffffff", "#1d2329", "#5f6b76", "#e3e7ea", "#f4f6f8"
SERIES = ("#0072b2", "#d55e00", "#009e73")
ACCENT = "#cc79a7"


def new_figure(
    height: float, rows: int = 1, columns: int = 1, *, titled: bool = False, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure WIDTH_INCHES wide and its (rows, columns) axes; `titled` leaves room on top."""
    figure = Figure(figsize=(WIDTH_INCHES, height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    figure.subplots_adjust(
        left=_LEFT / WIDTH_INCHES,
        right=1 - _RIGHT / WIDTH_INCHES,
        top=1 - (0.30 if titled else 0.08) / height,
        bottom=_BOTTOM / height,
    )
    for axes in grid.flat:
        axes.set_facecolor(BACKGROUND)
        axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", colors=MUTED, labelsize=8.5, length=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(color=MUTED, fontsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GRID)
    return figure, grid


def mark_stages(axes: Any, stages: Sequence[StageRow], *, labels: bool = False) -> None:
    """Shade every other stage, draw a dashed line where a merge closes one, and put names on top where they fit."""
    first, last = stages[0].start_step, stages[-1].end_step
    span = max(1, last - first)
    axes.set_xlim(first - 0.005 * span, last + 0.02 * span)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    every = math.ceil(len(stages) / MAX_STAGE_LABELS)
    for i, row in enumerate(stages):
        if i % 2 == 0:
            axes.axvspan(row.start_step, row.end_step, color=BAND, linewidth=0, zorder=0)
        if row.rank is not None:
            axes.axvline(row.end_step, color=ACCENT, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        if labels and i % every == 0:
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 8.5, "color": MUTED}
            axes.annotate(plain(row.stage), ((row.start_step + row.end_step) / 2, 1.03), **place)


def curve(axes: Any, x: NDArray[Any], y: Floats, colour: str, *, width: float, **style: Any) -> None:
    """Draw a line through the finite points, thinned by `downsample`, interrupted where a value is not finite."""
    x, y = downsample(x, y)
    axes.plot(x, np.where(np.isfinite(y), y, np.nan), color=colour, linewidth=width, **style)


def smoothed_curve(
    axes: Any, x: NDArray[Any], y: Floats, stages: Sequence[StageRow], colour: str, *, label: str | None = None
) -> None:
    """Draw the records faint, and their running mean within each stage strong. A merge is never smoothed over."""
    curve(axes, x, y, colour, width=0.6, alpha=0.4)
    for row in stages:
        inside = (x > row.start_step) & (x <= row.end_step)
        if np.isfinite(y[inside]).any():
            curve(axes, x[inside], running_mean(y[inside]), colour, width=1.6, label=label)
            label = None


def downsample(x: NDArray[Any], y: Floats, limit: int = MAX_POINTS) -> tuple[NDArray[Any], Floats]:
    """Return at most `limit` of the points, in order: of each bin the lowest, the highest and one gap if it has any.

    So no peak and no run of non-finite values disappears. Up to `limit` points nothing is left out.
    """
    if len(x) <= limit:
        return x, y
    kept: list[int] = []
    for part in np.array_split(np.arange(len(x)), max(1, limit // 3)):
        finite = part[np.isfinite(y[part])]
        chosen = {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])} if finite.size else set()
        if finite.size < part.size:
            chosen.add(int(part[~np.isfinite(y[part])][0]))
        kept.extend(sorted(chosen))
    return x[kept], y[kept]


def running_mean(values: Floats) -> Floats:
    """Return the (n,) mean of the finite values around each record, over a twentieth of all records; else NaN.

    Without lag: both sides weigh the same, from the first record, where the loss falls fastest; only near the end the
    right side runs out.
    """
    index, reach = np.arange(len(values)), max(2, len(values) // 40)
    first = index - np.minimum(index, reach)
    last = index + 1 + np.minimum(np.minimum(index, index[::-1]), reach)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    known = counts[last] - counts[first]
    means: Floats = np.where(known > 0, (sums[last] - sums[first]) / np.maximum(known, 1), np.nan)
    return means


def legend(axes: Any, *, columns: int = 3, place: str = "upper right") -> None:
    """Draw the names of the lines; nothing if no line has a name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=8.5, labelcolor=TEXT, ncols=columns, loc=place, borderaxespad=0.3,
            facecolor=BACKGROUND, edgecolor="none", framealpha=0.85,
        )  # fmt: skip


def log_scale(axis: Any, axes: Any) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def compact_numbers(axis: Any) -> None:
    """Write tick labels as '24.5', '2,500', '15k' or '1.5M', by where the axis ends. Call it after the limits."""
    end = max(axis.get_view_interval())
    if end < 1000:
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
        return
    unit, name = next(((u, n) for u, n in ((1e6, "M"), (1e3, "k")) if end >= 10 * u), (1.0, ""))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:,g}{name if value else ''}"))


def plain(text: str) -> str:
    """Return text that matplotlib draws as it stands: no mathtext, only glyphs its font has, at most 40 characters."""
    drawable = "".join(char if " " <= char <= "~" else "?" for char in text[:40])
    return drawable.replace("$", r"\$")


def to_png(figure: Figure, *, dpi: int) -> bytes:
    """Return PNG bytes in at most PALETTE colours: a third of the size, and no one can tell. The same every time."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(PALETTE, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "PNG")
    return buffer.getvalue()
