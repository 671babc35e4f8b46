"""The curves of a page as inline SVG: readable and printable as they stand, and charts.js lets one hover and zoom.

Numbers are placed here, the elements are in templates/parts.html. The script reads geometry and numbers from their
attributes data-*.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from relora_train.reports.plot_style import Floats, downsample
from relora_train.reports.run_data import StageRow

MAX_NAMES = 12
"""Stages whose names stand above a chart at most."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A line, or points; NaN interrupts a line."""

    label: str
    """Empty for a curve that the legend and the hover leave out."""
    x: NDArray[np.int64]
    y: Floats
    look: str
    """Classes of style.css: c0, c1 or c2, and 'faint', 'thick' or 'points'."""

    @cached_property
    def points(self) -> list[tuple[int, float]]:
        """Step and value, thinned by `downsample`."""
        x, y = downsample(self.x, self.y)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    @property
    def steps_text(self) -> str:
        return " ".join(str(x) for x, _ in self.points)

    @property
    def values_text(self) -> str:
        return " ".join(f"{y:.6g}" if math.isfinite(y) else "-" for _, y in self.points)


@dataclass(frozen=True)
class Chart:
    """One figure. Its y axis begins at `lowest` and ends at `highest`, or where its curves do."""

    title: str
    caption: str
    curves: Sequence[Curve]
    height: int = 260
    logarithmic: bool = False
    lowest: float | None = None
    highest: float | None = None
    marks: Sequence[int] = ()
    """Steps to mark with a cross at the foot: records that are not finite."""

    def over(self, stages: Sequence[StageRow]) -> "PlacedChart":
        """Return the figure over the steps of these stages."""
        first = stages[0].start_step
        return PlacedChart(self, stages, first, max(stages[-1].end_step, first + 1), *self._limits())

    def draws(self, y: float) -> bool:
        """Return True if a value has a place on the axis."""
        return math.isfinite(y) and (y > 0 or not self.logarithmic)

    def _limits(self) -> tuple[float, float]:
        drawn = [y for curve in self.curves for y in curve.y.tolist() if self.draws(y)]
        low, high = min(drawn, default=0.1), max(drawn, default=1.0)
        if self.logarithmic:
            return low / 1.2, high * 1.2
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low = low - room if self.lowest is None else self.lowest
        return low, max(high + room if self.highest is None else self.highest, low + room)


@dataclass(frozen=True)
class PlacedChart:
    """A figure whose steps and values have places, in the units of a picture 1000 wide."""

    chart: Chart
    stages: Sequence[StageRow]
    first: int
    last: int
    low: float
    high: float

    left, right, top, width = 64, 988, 24, 1000

    @property
    def foot(self) -> int:
        return self.chart.height - 26

    def across(self, step: float) -> float:
        """Return the place of a step from the left."""
        return round(self.left + (step - self.first) / (self.last - self.first) * (self.right - self.left), 1)

    def up(self, value: float) -> float:
        """Return the place of a value from the top."""
        low, high, y = (math.log10(y) if self.chart.logarithmic else y for y in (self.low, self.high, value))
        return round(self.foot - (y - low) / (high - low) * (self.foot - self.top), 1)

    def path(self, curve: Curve) -> str:
        """Return a line as the commands of an SVG path."""
        drawn, pen = [], "M"
        for step, value in curve.points:
            if self.chart.draws(value):
                drawn.append(f"{pen}{self.across(step)} {self.up(value)}")
            pen = "L" if self.chart.draws(value) else "M"
        return "".join(drawn)

    def dots(self, curve: Curve) -> list[tuple[float, float] | None]:
        """Return the places of points, None for one that has none."""
        return [(self.across(x), self.up(y)) if self.chart.draws(y) else None for x, y in curve.points]

    @property
    def steps(self) -> list[int]:
        """The steps named below the chart."""
        return [int(step) for step in ticks(self.first, self.last, 10) if step == int(step)]

    @property
    def values(self) -> list[float]:
        """The values named beside the chart."""
        between = logarithmic_ticks if self.chart.logarithmic else ticks
        return between(self.low, self.high, 5)

    @property
    def named(self) -> Sequence[StageRow]:
        """The stages whose names have room."""
        return self.stages[:: math.ceil(len(self.stages) / MAX_NAMES)]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers in an interval, 0.5 to 1.5 times `about`: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= 0.7 * raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def logarithmic_ticks(low: float, high: float, about: int) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten in an interval; the powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) < about else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def tick_text(value: float) -> str:
    """Return '0.002', '15k' or '2e-6'."""
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * unit:
            return f"{value / unit:,g}{name}"
    return f"{value:,.6g}"
