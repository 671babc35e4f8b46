"""A safetensors file written one tensor at a time: what is written never has to exist all at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by name."""

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ALIGNMENT = 8


class TensorStream:
    """Tensors that come in the order of their layout, each made when its turn has come.

    If all ranks make each tensor together, every rank must come to the end of its stream: one of them by `write`, the
    others by `finish`.
    """

    def __init__(self, layout: Layout, tensors: Iterator[Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """metadata: at most one key, or the bytes of a file differ from one writing to the next elsewhere."""
        self.layout, self._tensors, self._metadata = layout, tensors, metadata

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_size(*entry) for entry in self.layout.values())

    def write(self, path: Path) -> None:
        """Write them all as a safetensors file. After an error the stream still has to be finished."""
        with path.open("wb") as file:
            file.write(_header(self.layout, self._metadata))
            for (name, (dtype, shape)), tensor in zip(self.layout.items(), self._tensors, strict=True):
                if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {dtype} {shape}")
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Go through what has not been written."""
        for _ in self._tensors:
            pass


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def _header(layout: Layout, metadata: Mapping[str, str] | None) -> bytes:
    """Return the format's header: the length in 8 bytes, then JSON filled up with spaces."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + _size(dtype, shape)
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
