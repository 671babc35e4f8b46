"""Safetensors files written one tensor at a time: what is written never has to exist all at once."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from relora_train.errors import ModelError
from relora_train.training.files import MODEL_FILE

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
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.layout.values())

    def write(self, path: Path) -> None:
        """Write them all as a safetensors file. After an error the stream still has to be finished."""
        with path.open("wb") as file:
            # The format's header: its length in 8 bytes, then JSON filled up with spaces.
            entries: dict[str, object] = {"__metadata__": dict(self._metadata)} if self._metadata else {}
            end = 0
            for name, (dtype, shape) in self.layout.items():
                start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
                entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            header = json.dumps(entries, separators=(",", ":")).encode()
            header += b" " * (-len(header) % _ALIGNMENT)
            file.write(len(header).to_bytes(8, "little") + header)
            for (name, (dtype, shape)), tensor in zip(self.layout.items(), self._tensors, strict=True):
                if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {dtype} {shape}")
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Go through what has not been written."""
        for _ in self._tensors:
            pass


def round_model(directory: Path, dtype: Literal["bfloat16", "float16"]) -> None:
    """Round the floating-point tensors of a model's files in place, and name the dtype in its config.json.

    Raises ModelError for a value that float16 cannot hold; the directory is then of no use.
    """
    sizes = [_round_file(path, getattr(torch, dtype)) for path in sorted(directory.glob("*.safetensors"))]
    index, config = directory / f"{MODEL_FILE}.index.json", directory / "config.json"
    if index.is_file():
        content = json.loads(index.read_bytes())
        content["metadata"] = {**content.get("metadata", {}), "total_size": sum(sizes)}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    if config.is_file():
        content = json.loads(config.read_bytes()) | {"dtype": dtype}
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _round_file(path: Path, dtype: torch.dtype) -> int:
    """Return the bytes of its tensors."""
    part = path.with_suffix(".part")
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        kept = {name: dtype if "F" in one.get_dtype() else file.get_tensor(name).dtype for name, one in slices.items()}
        layout = {name: (kept[name], tuple(one.get_shape())) for name, one in slices.items()}
        tensors = (_rounded(name, file.get_tensor(name), kept[name]) for name in layout)
        metadata = dict(sorted((file.metadata() or {}).items()))  # safetensors gives them in random order
        stream = TensorStream(layout, tensors, metadata)
        stream.write(part)
    part.replace(path)
    return stream.size_bytes


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    found = tensor.to(dtype)
    if tensor.is_floating_point() and not torch.equal(found.isfinite(), tensor.isfinite()):
        raise ModelError(f"{name} holds a value above {torch.finfo(dtype).max:g}, too large for {dtype}. Use bfloat16.")
    return found
