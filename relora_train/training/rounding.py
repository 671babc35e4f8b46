"""The weights of a written model rounded to fewer bytes, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from relora_train.errors import ModelError
from relora_train.training.files import MODEL_FILE
from relora_train.training.tensor_stream import TensorStream


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
