"""The tensors of a Hugging Face checkpoint directory, read a block at a time. numpy and safetensors only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from relora_train.errors import CheckpointCorruptError, ModelError, ModelNotFoundError
from relora_train.reports.ranks.measures import BLOCK_ROWS, Matrix

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class WeightDirectory:
    """The tensors of a Hugging Face checkpoint directory, one file or sharded, read only where asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = _files_of_weights(directory)

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
    """Map the bits of a bfloat16 tensor: numpy has no such type, and safetensors' numpy reader refuses it."""
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(header_bytes))[name]
    offset = 8 + header_bytes + entry["data_offsets"][0]
    return np.memmap(path, dtype=np.uint16, mode="r", offset=offset, shape=tuple(entry["shape"]))


def _as_float64(piece: NDArray[np.generic]) -> Matrix:
    if piece.dtype == np.uint16:  # bfloat16: the upper half of a float32
        piece = (piece.astype(np.uint32) << 16).view(np.float32)
    return piece.astype(np.float64)
