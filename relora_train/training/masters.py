"""The exact float32 weights behind those that a device holds rounded to bfloat16."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from relora_train.method.layer import relora_layers
from relora_train.training.files import read_tensor


class MasterWeights(MutableMapping[str, Tensor]):
    """float32 weights by name: the parent checkpoint's until overwritten, read from disk one at a time.

    One that is overwritten goes to the disk too: all merged ones together are as large as the model. Its file in
    `scratch` has no name any more, so nothing of it outlives the process.
    """

    def __init__(self, names: list[str], read: Callable[[str], Tensor], scratch: Path) -> None:
        self._names, self._read = set(names), read
        self._scratch = scratch if scratch.is_dir() else None  # on a machine beside the flow's: the system's own
        self._written: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._written[name] if name in self._written else self._read(name)

    def __setitem__(self, name: str, value: Tensor) -> None:
        value = value.detach().cpu().contiguous()
        if not value.numel():  # a rank without a row of it: an empty file cannot be mapped
            self._written[name] = value
            return
        with tempfile.NamedTemporaryFile(dir=self._scratch) as file:
            file.write(value.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=False, size=value.numel(), dtype=value.dtype)
        self._written[name] = mapped.view(value.shape)

    def __delitem__(self, name: str) -> None:
        raise TypeError("a master weight cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def round_frozen_weights(model: nn.Module, parent: Path | None, scratch: Path) -> MasterWeights:
    """Round the wrapped weights to bfloat16 in place; the exact ones stay in the parent's files, or else in memory."""
    in_memory: dict[str, Tensor] = {}
    names = []
    for module, layer in relora_layers(model):
        name = f"{module}.weight"
        names.append(name)
        if parent is None or read_tensor(parent, name, rows=slice(0, 0)) is None:  # asks only if it is there
            in_memory[name] = layer.weight.detach().clone()
        layer.weight.data = layer.weight.data.to(torch.bfloat16)

    def read(name: str) -> Tensor:
        return in_memory[name] if name in in_memory else cast(Tensor, read_tensor(cast(Path, parent), name))

    return MasterWeights(names, read, scratch)
