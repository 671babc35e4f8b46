"""What a training changed in the weights: singular values of W_end − W_start and the ranks they imply.

Streams: at most one layer is in memory, and of a large one (short side above GRAM_ABOVE) only a block of rows and its
Gram matrix. Everything is computed in float64 from the stored values. numpy and safetensors only: imports no torch.
Source of the measures: arXiv 2307.05695, figures 5 and 7 (counts below 0.1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from relora_train.errors import CheckpointCorruptError, ModelError, ModelNotFoundError

Matrix = NDArray[np.float64]

PAPER_THRESHOLD = 0.1
"""Singular values below this count as unused in the paper."""

GRAM_ABOVE = 2048
"""Short side above which singular values come from the Gram matrix."""

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_BLOCK_ROWS = 1024
_IN_A_BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<block>\d+)\.(?P<role>.+)\.weight")
_ATTENTION_ROLES = (
    ("q_proj", "query_key_value", "qkv_proj", "c_attn", "Wqkv", "query", "q_lin", "wq", "q"),
    ("v_proj", "value", "v_lin", "wv", "v"),
)
_MLP_ROLES = (
    ("up_proj", "gate_up_proj", "dense_h_to_4h", "fc1", "c_fc", "fc_in", "lin1", "wi_1", "wi", "intermediate.dense"),
    ("down_proj", "dense_4h_to_h", "fc2", "c_proj", "fc_out", "lin2", "wo", "output.dense"),
)


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
        """The paper's measure: how many of the min(shape) singular values are below 0.1."""
        return count_below(self.values)

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
    """How many singular values are below `threshold`."""
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
    """How many singular values exceed `tolerance`."""
    return int(np.count_nonzero(values > tolerance))


def rounding_tolerance(shape: tuple[int, int], *, largest: float, weight_rms: float) -> float:
    """The size a singular value of W_end − W_start can have by rounding alone.

    The larger of two parts. The weights: each merge rounds an entry w to float32, an error of about 0.29 ε₃₂ |w|
    (standard deviation), so the noise matrix has norm 0.29 ε₃₂ rms(W) (√m + √n); taking 1 for 0.29 allows for a dozen
    merges. The computation: ε₆₄ · max(m, n) · σ_max by SVD, √(ε₆₄ · min(m, n)) · σ_max by the Gram matrix.
    Not covered: weights stored in fewer bits than float32.
    """
    rows, columns = shape
    stored = float(np.finfo(np.float32).eps) * weight_rms * (math.sqrt(rows) + math.sqrt(columns))
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
    blocks = (tall[i : i + _BLOCK_ROWS].astype(np.float64) for i in range(0, tall.shape[0], _BLOCK_ROWS))
    gram = np.zeros((tall.shape[1], tall.shape[1]))
    for block in blocks:
        gram += _gram(block)
    return _roots(gram)


def _gram(block: Matrix) -> Matrix:
    product: Matrix = block.T @ block  # (short, short)
    return product


def _roots(gram: Matrix) -> Matrix:
    values: Matrix = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0.0, None))
    return values


def update_spectra(start_dir: Path, end_dir: Path, names: Sequence[str] | None = None) -> Iterator[LayerSpectrum]:
    """The spectrum of W_end − W_start of each named weight, one layer in memory at a time.

    Without names: `representative_layers` of the matrices both checkpoints have. Directories are in Hugging Face
    layout, one file or sharded. ModelError names a weight that is missing, reshaped, no matrix or not finite.
    """
    start, end = WeightDirectory(start_dir), WeightDirectory(end_dir)
    if names is None:
        shared = {name: start.shape(name) for name in start.names if name in end.names}
        names = representative_layers(shared)
    for name in names:
        yield _layer_spectrum(start, end, name)


def _layer_spectrum(start: WeightDirectory, end: WeightDirectory, name: str) -> LayerSpectrum:
    shape = start.shape(name)
    if shape != end.shape(name) or len(shape) != 2:
        raise ModelError(
            f"{name} has shape {shape} in {start.directory} and {end.shape(name)} in {end.directory}; "
            "a spectrum needs two matrices of one shape. Compare checkpoints of the same model."
        )
    short = min(shape)
    pieces: list[Matrix] = []
    gram = np.zeros((short, short) if short > GRAM_ABOVE else (0, 0))
    start_square = end_square = 0.0
    for before, after in zip(start.blocks(name), end.blocks(name), strict=True):  # (rows, short)
        start_square += float(np.sum(before**2))
        end_square += float(np.sum(after**2))
        if short > GRAM_ABOVE:
            gram += _gram(after - before)
        else:
            pieces.append(after - before)
    if not math.isfinite(start_square + end_square):
        raise ModelError(f"{name} holds values that are not finite in {start.directory} or {end.directory}.")
    values = _roots(gram) if short > GRAM_ABOVE else singular_values(np.concatenate(pieces))
    weight_rms = math.sqrt(end_square / math.prod(shape))
    tolerance = rounding_tolerance((shape[0], shape[1]), largest=float(values[0]), weight_rms=weight_rms)
    return LayerSpectrum(name, (shape[0], shape[1]), values, tolerance, math.sqrt(start_square))


def representative_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """A few weights that stand for a model: the same names always give the same choice.

    From the first, middle and last block of each stack: query, value (or the fused projection), MLP up and MLP down,
    by the names the common families use. A block of no known family gives its first four matrices by name.
    """
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in sorted(shapes):
        match = _IN_A_BLOCK.fullmatch(name)
        if match and len(shapes[name]) == 2:
            stacks.setdefault(match["stack"], {}).setdefault(int(match["block"]), {})[match["role"]] = name
    chosen: list[str] = []
    for _, blocks in sorted(stacks.items()):
        numbers = sorted(blocks)
        for number in sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}):
            chosen.extend(_representatives(blocks[number]))
    return tuple(chosen)


def _representatives(roles: dict[str, str]) -> list[str]:
    attention = [role for role in roles if "att" in role.lower()]
    mlp = [role for role in roles if role not in attention]
    found = [_first_ending(attention, endings) for endings in _ATTENTION_ROLES]
    found += [_first_ending(mlp, endings) for endings in _MLP_ROLES]
    known = [roles[role] for role in found if role is not None]
    return known or list(roles.values())[:4]


def _first_ending(roles: list[str], endings: tuple[str, ...]) -> str | None:
    matches = (role for ending in endings for role in roles if f".{role}".endswith(f".{ending}"))
    return next(matches, None)


class WeightDirectory:
    """The tensors of a Hugging Face checkpoint directory, one file or sharded, read only where asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = _files_of_weights(directory)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._files))

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def blocks(self, name: str) -> Iterator[Matrix]:
        """A (m, n) matrix in float64 as pieces (at most 1024, min(m, n)) along its long side; transposed when wide."""
        with self._open(name) as file:
            view = file.get_slice(name)
            rows, columns = view.get_shape()
            if view.get_dtype() == "BF16":
                view = _bfloat16_bits(self._file(name), name)
            for first in range(0, max(rows, columns), _BLOCK_ROWS):
                end = min(first + _BLOCK_ROWS, max(rows, columns))  # safetensors refuses to slice past the end
                yield _as_float64(view[first:end] if rows >= columns else view[:, first:end].T)

    def _open(self, name: str) -> Any:
        path = self._file(name)
        try:
            return safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise CheckpointCorruptError(f"{path} cannot be read: {error}. Fetch the checkpoint again.") from None

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise ModelError(
                f"{self.directory} has no weight {name!r}. It has {len(self._files)}, such as "
                f"{', '.join(self.names[:3])}; name one of these."
            )
        return self._files[name]


def _files_of_weights(directory: Path) -> dict[str, Path]:
    index, single = directory / INDEX_NAME, directory / WEIGHTS_NAME
    try:
        if index.is_file():
            weight_map = json.loads(index.read_bytes())["weight_map"]
            return {str(name): directory / Path(file).name for name, file in weight_map.items()}
        if not single.is_file():
            raise ModelNotFoundError(
                f"{directory} has neither {WEIGHTS_NAME} nor {INDEX_NAME}. Pass the directory of a checkpoint."
            )
        with safe_open(single, framework="numpy") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"The weights in {directory} cannot be read: {error}. Fetch them again.") from None


def _bfloat16_bits(path: Path, name: str) -> NDArray[np.uint16]:
    """The bits of a bfloat16 tensor, mapped: numpy has no such type, and safetensors' numpy reader refuses it."""
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(header_bytes))[name]
    offset = 8 + header_bytes + entry["data_offsets"][0]
    return np.memmap(path, dtype=np.uint16, mode="r", offset=offset, shape=tuple(entry["shape"]))


def _as_float64(piece: NDArray[np.generic]) -> Matrix:
    if piece.dtype == np.uint16:  # bfloat16: the upper half of a float32
        piece = (piece.astype(np.uint32) << 16).view(np.float32)
    return piece.astype(np.float64)
