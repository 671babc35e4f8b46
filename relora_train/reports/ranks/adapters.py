"""The low-rank updates that a checkpoint merged, read from its adapter/ a layer at a time. numpy and safetensors only.

An update stays in its two factors: neither B A nor any other matrix of the layer's size is ever made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from relora_train.errors import CheckpointCorruptError, ModelError
from relora_train.reports.ranks.measures import Matrix, singular_values

ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_PREFIX = "base_model.model."


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
    """The adapter of a checkpoint directory, under the names of the weights that it was merged into."""

    def __init__(self, directory: Path) -> None:
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


def overlap_by_chance(dimension: int, first: int, second: int) -> float:
    """Return the mean cos² of the principal angles that random subspaces have: max(d1, d2) / dimension."""
    return max(first, second) / dimension
