"""Singular values of a weight's update, and the ranks they imply. numpy only.

Everything is computed in float64. Source of the measures: arXiv 2307.05695, figures 5 and 7 (counts below 0.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from relora_train.errors import ModelError

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
        return count_below(self.values)

    @property
    def at_threshold(self) -> int:
        """The number of singular values of 0.1 or more."""
        return len(self.values) - self.below_threshold

    @property
    def effective_rank(self) -> float:
        return effective_rank(self.values)

    @property
    def stable_rank(self) -> float:
        return stable_rank(self.values)

    @property
    def numerical_rank(self) -> int:
        return numerical_rank(self.values, self.tolerance)


def count_below(values: Matrix, threshold: float = PAPER_THRESHOLD) -> int:
    """Return the number of singular values below `threshold`."""
    return int(np.count_nonzero(values < threshold))


def effective_rank(values: Matrix) -> float:
    """exp(entropy of σ / Σσ): n for n equal values, 1 for a single one, 0 for a zero matrix. Roy and Vetterli, 2007."""
    total = float(np.sum(values))
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def stable_rank(values: Matrix) -> float:
    """‖W‖_F² / ‖W‖₂² of descending values, between 1 and the rank; 0 for a zero matrix."""
    total = float(np.sum(values**2))
    return total / float(values[0]) ** 2 if total else 0.0


def numerical_rank(values: Matrix, tolerance: float) -> int:
    """Return the number of singular values above `tolerance`."""
    return int(np.count_nonzero(values > tolerance))


def rounding_tolerance(shape: tuple[int, int], *, largest: float, weight_rms: float, update_rms: float = 0.0) -> float:
    """Return the size a singular value of W_end − W_start can have by rounding alone.

    The larger of two parts. What was stored: a merge rounds an entry w to float32, an error of about 0.29 ε₃₂ |w|
    (standard deviation), and taking 1 for 0.29 allows for a dozen merges; the product B A in it, summed in float32 over
    the rank r, is off by up to 0.29 √(r/2) ε₃₂ rms(ΔW) over all merges together, and taking 4 allows for r = 380. Noise
    of deviation d has the norm d (√m + √n). The computation: ε₆₄ · max(m, n) · σ_max by SVD, √(ε₆₄ · min(m, n)) · σ_max
    by the Gram matrix. Not covered: weights stored in fewer bits than float32.
    """
    rows, columns = shape
    deviation = float(np.finfo(np.float32).eps) * (weight_rms + 4 * update_rms)
    stored = deviation * (math.sqrt(rows) + math.sqrt(columns))
    eps = float(np.finfo(np.float64).eps)
    relative = math.sqrt(eps * min(shape)) if min(shape) > GRAM_ABOVE else eps * max(shape)
    return max(stored, relative * largest)


def singular_values(delta: NDArray[np.floating]) -> Matrix:
    """Singular values of a (m, n) matrix, descending, in float64.

    By SVD up to a short side of GRAM_ABOVE, else as roots of the Gram matrix's eigenvalues: an eigenvalue is off by
    about ε₆₄ σ_max², so σ by ε₆₄ σ_max² / 2σ; below √(ε₆₄ · min(m, n)) · σ_max (7e-7 σ_max at 2048) all is noise.
    """
    if delta.ndim != 2:
        raise ModelError(f"Singular values need a matrix, not an array of shape {delta.shape}.")
    if not np.isfinite(delta).all():
        raise ModelError(f"A matrix of shape {delta.shape} holds values that are not finite; it has no spectrum.")
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T  # (long, short)
    if tall.shape[1] <= GRAM_ABOVE:
        values: Matrix = np.linalg.svd(tall.astype(np.float64), compute_uv=False)
        return values
    blocks = (tall[i : i + BLOCK_ROWS].astype(np.float64) for i in range(0, tall.shape[0], BLOCK_ROWS))
    gram = np.zeros((tall.shape[1], tall.shape[1]))
    for block in blocks:
        gram += gram_matrix(block)
    return gram_singular_values(gram)


def gram_matrix(block: Matrix) -> Matrix:
    product: Matrix = block.T @ block  # (short, short)
    return product


def gram_singular_values(gram: Matrix) -> Matrix:
    values: Matrix = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0.0, None))
    return values
