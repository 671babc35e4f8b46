"""Let ReLoRA layers work together: those that read one input multiply in one function, in the best way.

Without this the layers follow the reference in layer.py, one by one: the same function, up to the order of rounding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relora_train.method.layer import ReLoRALinear, relora_layers
from relora_train.method.low_rank import Factors, low_rank_linears
from relora_train.method.products import Products, choose_products, sibling_groups


class SharedInput:
    """ReLoRA layers that are called with the same tensor; the first call computes all of them."""

    def __init__(self, layers: Sequence[ReLoRALinear], products: Products) -> None:
        self.layers, self.products = tuple(layers), products
        self._x: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._waiting: dict[int, Tensor] = {}  # outputs that the other siblings have yet to ask for
        self._merged: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    def __call__(self, layer: ReLoRALinear, x: Tensor) -> Tensor:
        """Return the layer's output for x (..., in). Any tensor and order of calls is right, the same is fast."""
        # The same tensor is the same input only as long as nobody wrote into it: _version counts the writes.
        key = (x._version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type), layer.training)
        if self._x is not x or self._key != key or id(layer) not in self._waiting:
            merges, dropout = self.products != "split", layer.dropout if layer.training else 0.0
            factors = [
                Factors(
                    each.matrix, each.bias, each.lora_A, each.lora_B, self._merge(each) if merges else None, each.scales
                )
                for each in self.layers
            ]
            made = low_rank_linears(x, factors, self.products, layer.scaling, dropout, layer.mask_seed)
            self._x, self._key, self._waiting = x, key, dict(zip(map(id, self.layers), made, strict=True))
        output = self._waiting.pop(id(layer))
        if not self._waiting:
            self._x = None  # else it would stay in memory until the next forward pass
        return output

    @torch.no_grad()
    def _merge(self, layer: ReLoRALinear) -> Tensor:
        """Return W + s BA, made once an update however many forward passes, and again after a change of the three."""
        tensors = (layer.weight, layer.lora_A, layer.lora_B)
        state = tuple(number for tensor in tensors for number in (tensor._version, tensor.data_ptr()))
        if self._merged.get(id(layer), (None,))[0] != state:
            merged = torch.addmm(layer.matrix, layer.lora_B, layer.lora_A, alpha=layer.scaling)
            self._merged[id(layer)] = state, merged
        return self._merged[id(layer)][1]

    def forget_after_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        """Drop the merged weights: a hook for after an optimizer's step."""
        self._merged.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Leave a copied model on the reference: its layers are others."""
        return


def share_inputs(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Products]:
    """Put every ReLoRA layer of the model on the fast path; return how each multiplies, by module name.

    optimizer: the one that updates the layers. Given it, merged weights may be kept, which takes as much memory again
    as the wrapped weights.
    """
    chosen: dict[str, Products] = {}
    for group in _groups(model):
        layers = list(group.values())
        first = layers[0]
        exact = first.dropout == 0 and first.weight.dtype in (torch.float32, torch.float64)
        products = choose_products(
            first.in_features,
            [layer.out_features for layer in layers],
            first.rank,
            merges=exact and optimizer is not None,
            device=first.weight.device.type,
        )
        shared = SharedInput(layers, products)
        if optimizer is not None and products != "split":
            # Fused optimizers change parameters without a trace in _version: only this tells that W + s BA is old.
            optimizer.register_step_post_hook(shared.forget_after_step)
        for name, layer in group.items():
            layer.shared = shared
            chosen[name] = products
    return chosen


def join_siblings(model: nn.Module) -> None:
    """Let layers that read one input find each other, for graphs of torch.compile."""
    for group in _groups(model):
        for layer in group.values():
            layer.siblings = tuple(other for other in group.values() if other is not layer)


def _groups(model: nn.Module) -> list[dict[str, ReLoRALinear]]:
    """Return the layers by name, together those that read one input and differ in nothing but `out`."""
    named = dict(relora_layers(model))
    facts = {n: (o.in_features, o.rank, o.scaling, o.dropout, o.weight.dtype) for n, o in named.items()}
    groups: list[tuple[str, ...]] = []
    for siblings in sibling_groups(list(named)):
        alike = len({facts[name] for name in siblings}) == 1
        groups += [siblings] if alike else [(name,) for name in siblings]
    return [{name: named[name] for name in names} for names in groups]


class HashMasks:
    """Dropout of a model's ReLoRA layers by hashed masks, the same in eager and compiled code and on any device."""

    def __init__(self, model: nn.Module) -> None:
        self._groups = [list(group.values()) for group in _groups(model)]
        self.draw()

    def draw(self) -> None:
        """Take new masks from torch's default CPU generator: before each forward pass whose masks are to be new."""
        # Rows of 16 bytes, of which two numbers are used: inductor copies inputs that are not so aligned.
        numbers = torch.randint(-(2**31), 2**31, (len(self._groups), 4), device="cpu").to(torch.int32)
        numbers = numbers.to(self._groups[0][0].weight.device, non_blocking=True)
        for layers, row in zip(self._groups, numbers, strict=True):
            seed = row[:2]  # the same tensor for all of them: a graph then makes one mask
            for layer in layers:
                layer.mask_seed = seed
