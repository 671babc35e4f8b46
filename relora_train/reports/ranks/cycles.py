"""From cycle to cycle: how the rank of the total update grows, and how much the updates' subspaces overlap.

Both follow from the adapters alone, a layer at a time: no weights are read. An update stays in its two factors; neither
B A nor any other matrix of the layer's size is ever made. numpy and safetensors only.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from relora_train.errors import CheckpointCorruptError, ModelError
from relora_train.reports.ranks.measures import LayerSpectrum, Matrix, singular_values, spectrum_of_values

ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_PREFIX = "base_model.model."
MAX_GROWTH_POINTS = 12
"""If there are more cycles, this many are used, evenly spread, the first and the last among them."""


@dataclass(frozen=True, eq=False)
class Factors:
    """One layer's update B A in float64; the scaling is in B."""

    B: Matrix
    """(out, rank)"""
    A: Matrix
    """(rank, in)"""

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), of the weight it was merged into."""
        return len(self.B), self.A.shape[1]


class AdapterDirectory:
    """The adapter of a stage's checkpoint directory, under the names of the weights that it was merged into.

    weight_norms: their Frobenius norms before the merge, by name, as the manifest tells them; may be empty.
    """

    def __init__(self, directory: Path, stage: str = "", weight_norms: Mapping[str, float] | None = None) -> None:
        self.stage, self.weight_norms = stage, weight_norms or {}
        config, self._path = (directory / name for name in ADAPTER_FILES)
        try:
            settings = json.loads(config.read_bytes())
            rank = int(settings["r"])
            root = math.sqrt(rank) if settings.get("use_rslora") else rank
            self._scaling = float(settings["lora_alpha"]) / root
            with safe_open(self._path, framework="numpy") as file:
                self._tensors = frozenset(file.keys())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise CheckpointCorruptError(f"The adapter in {config.parent} cannot be read: {error}.") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the updated weights, sorted."""
        end = ".lora_A.weight"
        return tuple(sorted(f"{n[len(_PREFIX) : -len(end)]}.weight" for n in self._tensors if n.endswith(end)))

    def shape(self, name: str) -> tuple[int, int]:
        """Return (out, in) of a weight, without reading its factors."""
        with self._open() as file:
            left, right = (file.get_slice(self._tensor(name, factor)).get_shape() for factor in ("B", "A"))
            return int(left[0]), int(right[1])

    def factors(self, name: str) -> Factors:
        """Return the update of one weight. Raises ModelError if there is none or a value is not finite."""
        with self._open() as file:
            A = file.get_tensor(self._tensor(name, "A")).astype(np.float64)
            B = file.get_tensor(self._tensor(name, "B")).astype(np.float64)
        if not (np.isfinite(A).all() and np.isfinite(B).all()):
            raise ModelError(f"The low-rank update of {name} in {self._path} holds values that are not finite.")
        return Factors(self._scaling * B, A)

    def _tensor(self, name: str, factor: str) -> str:
        tensor = f"{_PREFIX}{name.removesuffix('.weight')}.lora_{factor}.weight"
        if tensor not in self._tensors:
            raise ModelError(
                f"{self._path} holds no update of {name}. It updates {len(self.names)} weights, such as "
                f"{', '.join(self.names[:3])}; name one of these."
            )
        return tensor

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise CheckpointCorruptError(f"{self._path} cannot be read: {error}. Fetch it again.") from None


def singular_values_of_sums(updates: Sequence[Factors], ends: Sequence[int]) -> list[Matrix]:
    """Return the singular values of the sum of the first k updates, for each k of `ends`; exact up to float64 rounding.

    Each (min(out, in),), descending. The sum is P Q with P = [B_1 … B_k] and Q = [A_1; …; A_k], so its values are those
    of R_P R_Qᵀ, where P = O R_P and Qᵀ = O′ R_Q; the R of the first columns is the first columns of the whole R.
    """
    rows, columns = updates[0].shape
    factors = np.hstack([update.B for update in updates]), np.vstack([update.A for update in updates]).T
    R_P, R_Q = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in factors)  # (min(out, ranks), ranks)
    widths = np.cumsum([update.rank for update in updates])
    found = []
    for width in (int(widths[end - 1]) for end in ends):
        core = R_P[: min(rows, width), :width] @ R_Q[: min(columns, width), :width].T
        values = singular_values(core)
        found.append(np.pad(values, (0, min(rows, columns) - len(values))))
    return found


def subspaces(update: Factors) -> tuple[Matrix, Matrix]:
    """Return orthonormal bases (out, d) of the update's column space and (in, d) of its row space, strongest first.

    d counts the singular values above float32 rounding of the factors: 0 for an update that is zero.
    """
    Q_B, R_B = np.linalg.qr(update.B)
    Q_A, R_A = np.linalg.qr(update.A.T)
    left, values, right = np.linalg.svd(R_B @ R_A.T)
    floor = float(np.finfo(np.float32).eps) * math.sqrt(max(update.shape)) * float(values[0])
    d = int(np.count_nonzero(values > floor))
    return Q_B @ left[:, :d], Q_A @ right[:d].T


def principal_cosines(first: Matrix, second: Matrix) -> Matrix:
    """Return the cosines of the principal angles of subspaces with orthonormal bases (n, d1) and (n, d2), descending.

    (min(d1, d2),): all 1 where one contains the other, all 0 where they are orthogonal.
    """
    if 0 in (first.shape[1], second.shape[1]):
        return np.zeros(0)
    return np.clip(singular_values(first.T @ second), 0.0, 1.0)


def successive_overlaps(updates: Sequence[Factors]) -> Matrix:
    """Return (2, updates − 1, 2): of column spaces (what an update writes), then of row spaces (what it reads).

    For each update and the one before: the mean cos² of the principal angles, 1 where one subspace contains the other,
    0 where they are orthogonal, NaN beside an update of zero; and what random subspaces have, max(d1, d2) / dimension.
    """
    sides = zip(*map(subspaces, updates), strict=True)
    return np.array([[_overlap(*pair) for pair in itertools.pairwise(bases)] for bases in sides])


def _overlap(first: Matrix, second: Matrix) -> tuple[float, float]:
    cosines = principal_cosines(first, second)
    chance = max(first.shape[1], second.shape[1]) / len(first)
    return float(np.mean(cosines**2)) if cosines.size else math.nan, chance


@dataclass(frozen=True, eq=False)
class CycleHistory:
    """A run's cycles, or for full rank its stages, as their updates tell it."""

    growth_stages: tuple[str, ...]
    growth_ranks: tuple[int | None, ...]
    """The largest possible rank of the total update; None for full-rank stages."""
    growth: tuple[tuple[LayerSpectrum, ...], ...]
    """The total update of each layer after each of these stages."""
    overlap: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean cos² of successive cycles over all layers, and what chance gives: of "columns" and "rows".

    Empty for full rank, and where there is only one low-rank stage.
    """

    def record(self) -> dict[str, Any]:
        """Return growth by layer, without singular values, and overlaps as plain values."""
        growth = [{"name": spectra[0].name, "after": [one.measures() for one in spectra]} for spectra in self.growth]
        overlap = {side: {"mean": mean, "chance": chance} for side, (mean, chance) in self.overlap.items()}
        stages = {"growth_stages": self.growth_stages, "growth_ranks": self.growth_ranks}
        return {**stages, "growth": growth, "overlap": overlap}


def cycle_history(
    cycles: Sequence[AdapterDirectory], names: Sequence[str], on_layer: Callable[[str], None] = lambda name: None
) -> CycleHistory:
    """Growth and overlaps of these weights over all cycles; at least one cycle. `on_layer` hears each name in turn.

    A layer's factors over all cycles are in memory at once.
    """
    ends = growth_points(len(cycles))
    growth, overlaps, widths = [], [], [0] * len(cycles)
    for name in names:
        on_layer(name)
        updates = [cycle.factors(name) for cycle in cycles]
        widths = [int(width) for width in np.cumsum([update.rank for update in updates])]
        shape, norm = updates[0].shape, cycles[0].weight_norms.get(name, math.nan)
        rms = 0.0 if math.isnan(norm) else norm / math.sqrt(math.prod(shape))
        sums = singular_values_of_sums(updates, ends)
        spectra = (spectrum_of_values(name, shape, values, weight_rms=rms, start_norm=norm) for values in sums)
        growth.append(tuple(spectra))
        if len(cycles) > 1:
            overlaps.append(successive_overlaps(updates))
    overlap = {}
    for side, pairs in zip(("columns", "rows"), np.stack(overlaps, axis=1) if overlaps else (), strict=False):
        cosines = pairs[..., 0][np.isfinite(pairs[..., 0])]
        overlap[side] = float(np.mean(cosines)) if cosines.size else math.nan, float(np.mean(pairs[..., 1]))
    return CycleHistory(
        growth_stages=tuple(cycles[end - 1].stage for end in ends),
        growth_ranks=tuple(widths[end - 1] for end in ends),
        growth=tuple(growth),
        overlap=overlap,
    )


def growth_points(cycles: int) -> list[int]:
    """After which cycles, counted from 1, the growth is looked at."""
    return sorted({round(point) for point in np.linspace(1, cycles, min(cycles, MAX_GROWTH_POINTS))})


def history_operations(shapes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> float:
    """About how many floating-point operations `cycle_history` takes for layers of these shapes."""
    widths = np.cumsum(ranks)
    total = 0.0
    for rows, columns in shapes:
        width = int(widths[-1])
        total += 2.0 * (rows + columns) * width**2  # the two QR
        for end in growth_points(len(ranks)):
            first, second = min(rows, int(widths[end - 1])), min(columns, int(widths[end - 1]))
            total += 6.0 * first * second * min(first, second)
    return total
