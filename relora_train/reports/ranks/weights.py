"""The weights of a Hugging Face checkpoint directory, and the spectrum of what a training changed in each.

Streams: at most one layer is in memory, and of a large one (short side above GRAM_ABOVE) only a block of rows and its
Gram matrix. Everything is computed in float64 from the stored values. numpy and safetensors only: imports no torch.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from relora_train.errors import CheckpointCorruptError, ModelError, ModelNotFoundError
from relora_train.reports.ranks.layers import representative_layers
from relora_train.reports.ranks.measures import (
    BLOCK_ROWS,
    LayerSpectrum,
    Matrix,
    singular_values_of_blocks,
    spectrum_of_values,
)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class WeightDirectory:
    """The tensors of a Hugging Face checkpoint directory, one file or sharded, read only where asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index, single = directory / INDEX_NAME, directory / WEIGHTS_NAME
        try:
            if index.is_file():
                weight_map = json.loads(index.read_bytes())["weight_map"]
                self._files = {str(name): directory / Path(file).name for name, file in weight_map.items()}
            elif single.is_file():
                with safe_open(single, framework="numpy") as file:
                    self._files = dict.fromkeys(file.keys(), single)
            else:
                raise ModelNotFoundError(
                    f"{directory} has neither {WEIGHTS_NAME} nor {INDEX_NAME}. Pass the directory of a checkpoint."
                )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointCorruptError(
                f"The weights in {directory} cannot be read: {error}. Fetch them again."
            ) from None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._files))

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the tensors whose file is there, sorted: of a sharded checkpoint some may not have been fetched."""
        there = {path for path in set(self._files.values()) if path.is_file()}
        return tuple(sorted(name for name, path in self._files.items() if path in there))

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def blocks(self, name: str) -> Iterator[Matrix]:
        """Yield a (m, n) float64 matrix in pieces (at most 1024, min(m, n)) along its long side, transposed if wide."""
        with self._open(name) as file:
            view = file.get_slice(name)
            rows, columns = view.get_shape()
            if view.get_dtype() == "BF16":
                view = _bfloat16_bits(self._file(name), name)
            for first in range(0, max(rows, columns), BLOCK_ROWS):
                end = min(first + BLOCK_ROWS, max(rows, columns))  # safetensors refuses to slice past the end
                piece = view[first:end] if rows >= columns else view[:, first:end].T
                if piece.dtype == np.uint16:  # bfloat16: the upper half of a float32
                    piece = (piece.astype(np.uint32) << 16).view(np.float32)
                yield piece.astype(np.float64)

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


def _bfloat16_bits(path: Path, name: str) -> NDArray[np.uint16]:
    """Map the bits of a bfloat16 tensor: numpy has no such type, and safetensors' numpy reader refuses it."""
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(header_bytes))[name]
    offset = 8 + header_bytes + entry["data_offsets"][0]
    return np.memmap(path, dtype=np.uint16, mode="r", offset=offset, shape=tuple(entry["shape"]))


def update_spectra(start_dir: Path, end_dir: Path, names: Sequence[str] | None = None) -> Iterator[LayerSpectrum]:
    """Yield the spectrum of W_end − W_start of each named weight, one layer in memory at a time.

    Without names: `representative_layers` of the matrices both checkpoints have. Directories are in Hugging Face
    layout, one file or sharded. ModelError names a weight that is missing, reshaped, no matrix or not finite.
    """
    start, end = WeightDirectory(start_dir), WeightDirectory(end_dir)
    if names is None:
        names = representative_layers({name: start.shape(name) for name in start.names if name in end.names})
    for name in names:
        yield _update_spectrum(start, end, name)


def _update_spectrum(start: WeightDirectory, end: WeightDirectory, name: str) -> LayerSpectrum:
    shape = start.shape(name)
    if shape != end.shape(name) or len(shape) != 2:
        raise ModelError(
            f"{name} has shape {shape} in {start.directory} and {end.shape(name)} in {end.directory}; "
            "a spectrum needs two matrices of one shape. Compare checkpoints of the same model."
        )
    start_square = end_square = 0.0

    def differences() -> Iterator[Matrix]:
        nonlocal start_square, end_square
        for before, after in zip(start.blocks(name), end.blocks(name), strict=True):  # (rows, short)
            start_square += float(np.sum(before**2))
            end_square += float(np.sum(after**2))
            if not math.isfinite(start_square + end_square):
                raise ModelError(f"{name} holds values that are not finite in {start.directory} or {end.directory}.")
            yield after - before

    values = singular_values_of_blocks(differences(), min(shape))
    return spectrum_of_values(
        name,
        (shape[0], shape[1]),
        values,
        weight_rms=math.sqrt(end_square / math.prod(shape)),
        start_norm=math.sqrt(start_square),
    )
