"""From cycle to cycle: how the rank of the total update grows, and how much the updates' subspaces overlap.

Both follow from the adapters alone, a layer at a time: no weights are read. numpy and safetensors only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from relora_train.reports.ranks.adapters import (
    AdapterDirectory,
    Factors,
    overlap_by_chance,
    principal_cosines,
    singular_values_of_sums,
    subspaces,
)
from relora_train.reports.ranks.measures import LayerSpectrum, Matrix, spectrum_of_values

MAX_GROWTH_POINTS = 12
"""If there are more cycles, this many are used, evenly spread, the first and the last among them."""


@dataclass(frozen=True)
class MergedCycle:
    """One low-rank stage: its adapter, and the norms of the weights it was merged into as its manifest tells them."""

    stage: str
    adapter: AdapterDirectory
    weight_norms: Mapping[str, float]
    """Frobenius norms before the merge, by the weight's name; may be empty."""


@dataclass(frozen=True, eq=False)
class LayerGrowth:
    """The total update of one layer after each of the stages of its `CycleHistory.growth_stages`."""

    name: str
    spectra: tuple[LayerSpectrum, ...]


@dataclass(frozen=True, eq=False)
class LayerOverlap:
    """The overlaps of one layer's updates, for the stages of `CycleHistory.stages`.

    Overlap is the mean cos² of the principal angles: 1 where one subspace contains the other, 0 where they are
    orthogonal. NaN beside an update that is zero.
    """

    name: str
    columns: Matrix
    """(stages, stages), of the column spaces: what the layer writes."""
    rows: Matrix
    """(stages, stages), of the row spaces: what the layer reads."""
    column_cosines: tuple[Matrix, ...]
    """Cosines of all principal angles of each stage with the one before it, descending; stages − 1 of them."""
    row_cosines: tuple[Matrix, ...]
    chance_columns: float
    """The overlap that random subspaces of these dimensions have on average."""
    chance_rows: float


@dataclass(frozen=True, eq=False)
class CycleHistory:
    """A run's cycles, or for full rank its stages, as their updates tell it."""

    growth_stages: tuple[str, ...]
    growth_ranks: tuple[int | None, ...]
    """The largest possible rank of the total update; None for full-rank stages."""
    growth: tuple[LayerGrowth, ...]
    stages: tuple[str, ...] = ()
    overlaps: tuple[LayerOverlap, ...] = ()
    """Empty for full rank, and where there is only one low-rank stage."""


def cycle_history(
    cycles: Sequence[MergedCycle], names: Sequence[str], on_layer: Callable[[str], None] = lambda name: None
) -> CycleHistory:
    """Growth and overlaps of these weights over all cycles; at least one cycle. `on_layer` hears each name in turn.

    A layer's factors over all cycles are in memory at once.
    """
    ends = growth_points(len(cycles))
    growth, overlaps, widths = [], [], [0] * len(cycles)
    for name in names:
        on_layer(name)
        updates = [cycle.adapter.factors(name) for cycle in cycles]
        widths = [int(width) for width in np.cumsum([update.rank for update in updates])]
        shape, norm = updates[0].shape, cycles[0].weight_norms.get(name, math.nan)
        rms = 0.0 if math.isnan(norm) else norm / math.sqrt(math.prod(shape))
        sums = singular_values_of_sums(updates, ends)
        spectra = (spectrum_of_values(name, shape, values, weight_rms=rms, start_norm=norm) for values in sums)
        growth.append(LayerGrowth(name, tuple(spectra)))
        if len(cycles) > 1:
            overlaps.append(layer_overlap(name, updates))
    return CycleHistory(
        growth_stages=tuple(cycles[end - 1].stage for end in ends),
        growth_ranks=tuple(widths[end - 1] for end in ends),
        growth=tuple(growth),
        stages=tuple(cycle.stage for cycle in cycles),
        overlaps=tuple(overlaps),
    )


def layer_overlap(name: str, updates: Sequence[Factors]) -> LayerOverlap:
    """Return the overlap of every pair of a layer's updates, which are two or more."""
    bases = [subspaces(update) for update in updates]
    rows, columns = updates[0].shape
    written, write_cosines, write_chance = _pairs([left for left, _ in bases], rows)
    read, read_cosines, read_chance = _pairs([right for _, right in bases], columns)
    return LayerOverlap(name, written, read, write_cosines, read_cosines, write_chance, read_chance)


def growth_points(cycles: int) -> list[int]:
    """After which cycles, counted from 1, the growth is looked at."""
    return sorted({round(point) for point in np.linspace(1, cycles, min(cycles, MAX_GROWTH_POINTS))})


def history_operations(shapes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> float:
    """About how many floating-point operations `cycle_history` takes for layers of these shapes."""
    widths = np.cumsum(ranks)
    total = 0.0
    for rows, columns in shapes:
        width = int(widths[-1])
        total += 2.0 * (rows + columns) * width**2  # the two QR, and the pairs of subspaces, which are as many
        for end in growth_points(len(ranks)):
            first, second = min(rows, int(widths[end - 1])), min(columns, int(widths[end - 1]))
            total += 6.0 * first * second * min(first, second)
    return total


def _pairs(bases: Sequence[Matrix], dimension: int) -> tuple[Matrix, tuple[Matrix, ...], float]:
    """Return the mean cos² of every pair, the cosines of successive ones, and the mean cos² by chance."""
    count = len(bases)
    overlaps, successive = np.full((count, count), np.nan), []
    for i in range(count):
        for j in range(i + 1):
            cosines = principal_cosines(bases[i], bases[j])
            if cosines.size:
                overlaps[i, j] = overlaps[j, i] = float(np.mean(cosines**2))
            if j == i - 1:
                successive.append(cosines)
    sizes = [basis.shape[1] for basis in bases]
    chances = [overlap_by_chance(dimension, a, b) for a, b in itertools.pairwise(sizes)]
    return overlaps, tuple(successive), float(np.mean(chances))


def successive_overlap(overlaps: Sequence[LayerOverlap], side: str) -> tuple[float, float]:
    """Return the mean overlap of successive stages in 'columns' or 'rows', and the mean that chance would give."""
    values = [np.diag(getattr(one, side), k=1) for one in overlaps]
    chances = [getattr(one, f"chance_{side}") for one in overlaps]
    known = np.concatenate(values)
    known = known[np.isfinite(known)]
    return float(np.mean(known)) if known.size else math.nan, float(np.mean(chances))
