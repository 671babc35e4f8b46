"""Memory that torch's operations hold, counted operation by operation: exact, on any device, and slow."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Bytes of the memory that operations made and that is still held: now, and the most there was."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                key = storage._cdata
                self._known[key] = storage.nbytes()
                weakref.finalize(storage, self._known.pop, key, None)
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        return sum(self._known.values())


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
