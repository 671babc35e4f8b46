"""Singular values of a weight's update, and the ranks they imply. numpy only.

Everything is computed in float64. Source of the measures: arXiv 2307.05695, figures 5 and 7 (counts below 0.1).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relora_train.errors import ModelError
from relora_train.reports.ranks.layers import kind_of

Matrix = NDArray[np.float64]

PAPER_THRESHOLD = 0.1
"""Singular values below this count as unused in the paper."""

GRAM_ABOVE = 2048
"""Short side above which singular values come from the Gram matrix."""

BLOCK_ROWS = 1024
"""Rows of a large matrix that are in float64 at once."""


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """Singular values of one layer's update, and what they say about its rank."""

    name: str
    """The weight's name in the checkpoint."""

    shape: tuple[int, int]
    values: Matrix
    """(min(shape),), descending, non-negative."""

    tolerance: float
    """Below this a singular value cannot be told from rounding; see `rounding_tolerance`."""

    start_norm: float
    """Frobenius norm of W_start."""

    @property
    def update_norm(self) -> float:
        """Frobenius norm of the update."""
        return float(np.sqrt(np.sum(self.values**2)))

    @property
    def relative_update_norm(self) -> float:
        """‖W_end − W_start‖ / ‖W_start‖; infinite when W_start is zero and the update is not."""
        if self.update_norm == 0:
            return 0.0
        return self.update_norm / self.start_norm if self.start_norm else math.inf

    @property
    def below_threshold(self) -> int:
        """The paper's measure: the number of the min(shape) singular values that are below 0.1."""
        return int(np.count_nonzero(self.values < PAPER_THRESHOLD))

    @property
    def at_threshold(self) -> int:
        """The number of singular values of 0.1 or more."""
        return len(self.values) - self.below_threshold

    @property
    def effective_rank(self) -> float:
        """exp(entropy of σ / Σσ): n for n equal values, 1 for a single one, 0 for none. Roy and Vetterli, 2007."""
        total = float(np.sum(self.values))
        if total == 0:
            return 0.0
        shares = self.values[self.values > 0] / total
        return float(np.exp(-np.sum(shares * np.log(shares))))

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / ‖ΔW‖₂², between 1 and the rank; 0 for a zero matrix."""
        total = float(np.sum(self.values**2))
        return total / float(self.values[0]) ** 2 if total else 0.0

    @property
    def numerical_rank(self) -> int:
        """The number of singular values above the tolerance."""
        return int(np.count_nonzero(self.values > self.tolerance))

    def measures(self) -> dict[str, Any]:
        """Return the numbers as plain values, without the singular values."""
        largest = float(self.values[0])
        return {"shape": self.shape, "largest": largest, "tolerance": self.tolerance, **_ranks(self)}

    def record(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {"name": self.name, **self.measures(), "singular_values": _rounded(self.values)}


@dataclass(frozen=True, eq=False)
class KindSpectrum:
    """Means over the layers of one kind and shape: the q_proj of every block, the up_proj of every block."""

    kind: str
    shape: tuple[int, int]
    layers: int
    values: Matrix
    """(min(shape),): the mean of the layers' first values, of their second values, …"""
    below_threshold: float
    effective_rank: float
    stable_rank: float
    numerical_rank: float
    relative_update_norm: float

    def record(self) -> dict[str, Any]:
        """Return everything as plain values."""
        about = {"kind": self.kind, "layers": self.layers, "shape": self.shape}
        return {**about, **_ranks(self), "singular_values": _rounded(self.values)}


def _ranks(measured: LayerSpectrum | KindSpectrum) -> dict[str, Any]:
    names = ("effective_rank", "stable_rank", "numerical_rank", "relative_update_norm")
    below = {"threshold": PAPER_THRESHOLD, "count": measured.below_threshold}
    return {"below": below, **{name: getattr(measured, name) for name in names}}


def _rounded(values: Matrix) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def json_value(value: Any) -> Any:
    """Return the value with every non-finite float as None, all the way down."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def by_kind(spectra: Iterable[LayerSpectrum]) -> dict[tuple[str, tuple[int, int]], list[LayerSpectrum]]:
    """Return the layers of each kind and shape, in the order in which the kinds first appear."""
    groups: dict[tuple[str, tuple[int, int]], list[LayerSpectrum]] = {}
    for spectrum in spectra:
        groups.setdefault((kind_of(spectrum.name), spectrum.shape), []).append(spectrum)
    return groups


def kind_means(spectra: Iterable[LayerSpectrum]) -> tuple[KindSpectrum, ...]:
    """Return the averages of each kind of layer."""
    averaged = ("below_threshold", "effective_rank", "stable_rank", "numerical_rank", "relative_update_norm")
    means = []
    for (kind, shape), layers in by_kind(spectra).items():
        values = np.mean([layer.values for layer in layers], axis=0)
        numbers = {name: float(np.mean([getattr(layer, name) for layer in layers])) for name in averaged}
        means.append(KindSpectrum(kind, shape, len(layers), values, **numbers))
    return tuple(means)


def rounding_tolerance(shape: tuple[int, int], *, largest: float, weight_rms: float, update_rms: float = 0.0) -> float:
    """Return the size a singular value of W_end − W_start can have by rounding alone.

    It is the larger of two parts, what was stored and the computation. A merge rounds an entry w to float32: an error
    of about 0.29 ε₃₂ |w| (standard deviation). Taking 1 for 0.29 allows for a dozen merges. The product B A, summed in
    float32 over the rank r, is off by up to 0.29 √(r/2) ε₃₂ rms(ΔW) over all merges. Taking 4 allows for r = 380.
    Noise of deviation d has the norm d (√m + √n). The computation adds ε₆₄ · max(m, n) · σ_max by SVD, or
    √(ε₆₄ · min(m, n)) · σ_max by the Gram matrix. Weights stored in fewer bits than float32 are not covered.
    """
    rows, columns = shape
    deviation = float(np.finfo(np.float32).eps) * (weight_rms + 4 * update_rms)
    stored = deviation * (math.sqrt(rows) + math.sqrt(columns))
    eps = float(np.finfo(np.float64).eps)
    relative = math.sqrt(eps * min(shape)) if min(shape) > GRAM_ABOVE else eps * max(shape)
    return max(stored, relative * largest)


def spectrum_of_values(
    name: str, shape: tuple[int, int], values: Matrix, *, weight_rms: float, start_norm: float
) -> LayerSpectrum:
    """Return the spectrum with the tolerance that follows from its values and the weight's root mean square."""
    update_rms = math.sqrt(float(np.sum(values**2)) / math.prod(shape))
    tolerance = rounding_tolerance(shape, largest=float(values[0]), weight_rms=weight_rms, update_rms=update_rms)
    return LayerSpectrum(name, shape, values, tolerance, start_norm)


def singular_values(delta: NDArray[np.floating]) -> Matrix:
    """Return the singular values of a (m, n) matrix, descending, in float64."""
    if delta.ndim != 2:
        raise ModelError(f"Singular values need a matrix, not an array of shape {delta.shape}.")
    if not np.isfinite(delta).all():
        raise ModelError(f"A matrix of shape {delta.shape} holds values that are not finite; it has no spectrum.")
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T  # (long, short)
    blocks = (tall[i : i + BLOCK_ROWS].astype(np.float64) for i in range(0, tall.shape[0], BLOCK_ROWS))
    return singular_values_of_blocks(blocks, tall.shape[1])


def singular_values_of_blocks(blocks: Iterable[Matrix], short: int) -> Matrix:
    """Return the singular values of a (long, short) matrix that comes in blocks of rows.

    By SVD up to a short side of GRAM_ABOVE, else as roots of the Gram matrix's eigenvalues: an eigenvalue is off by
    about ε₆₄ σ_max², so σ by ε₆₄ σ_max² / 2σ; below √(ε₆₄ · min(m, n)) · σ_max (7e-7 σ_max at 2048) all is noise.
    """
    if short <= GRAM_ABOVE:
        svd: Matrix = np.linalg.svd(np.concatenate(list(blocks)), compute_uv=False)
        return svd
    gram = np.zeros((short, short))
    for block in blocks:
        gram += block.T @ block
    roots: Matrix = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0.0, None))
    return roots
