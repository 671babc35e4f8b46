"""Let ReLoRA layers work together: those that read one input multiply in one function, in the best way.

Without this the layers follow the reference in layer.py, one by one: the same function, up to the order of rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relora_train.method.layer import ReLoRALinear, relora_layers
from relora_train.method.low_rank import Factors, low_rank_linears
from relora_train.method.products import Products, choose_products, sibling_groups


@dataclass
class _Waiting:
    """Outputs that were made with the first of the siblings and that the others have yet to ask for."""

    x: Tensor
    key: tuple[Any, ...]
    outputs: dict[int, Tensor]


class SharedInput:
    """ReLoRA layers that are called with the same tensor; the first call computes all of them."""

    def __init__(self, layers: Sequence[ReLoRALinear], products: Products) -> None:
        self.layers, self.products = tuple(layers), products
        self._waiting: _Waiting | None = None
        self._merged: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    def __call__(self, layer: ReLoRALinear, x: Tensor) -> Tensor:
        """Return the layer's output for x (..., in). Any tensor and order of calls is right, the same is fast."""
        key = (x._version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type), layer.training)
        waiting = self._waiting
        if waiting is None or waiting.x is not x or waiting.key != key or id(layer) not in waiting.outputs:
            waiting = self._waiting = _Waiting(x, key, self._compute(x, layer))
        output = waiting.outputs.pop(id(layer))
        if not waiting.outputs:
            self._waiting = None
        return output

    def _compute(self, x: Tensor, asked: ReLoRALinear) -> dict[int, Tensor]:
        factors = [
            Factors(
                layer.weight,
                layer.bias,
                layer.lora_A,
                layer.lora_B,
                None if self.products == "split" else self._merge(layer),
            )
            for layer in self.layers
        ]
        dropout = asked.dropout if asked.training else 0.0
        made = low_rank_linears(x, factors, self.products, asked.scaling, dropout)
        return {id(layer): output for layer, output in zip(self.layers, made, strict=True)}

    @torch.no_grad()
    def _merge(self, layer: ReLoRALinear) -> Tensor:
        """W + s BA, once an update however many forward passes, and again after any other change of the three."""
        tensors = (layer.weight, layer.lora_A, layer.lora_B)
        state = tuple(number for tensor in tensors for number in (tensor._version, tensor.data_ptr()))
        kept = self._merged.get(id(layer))
        if kept is not None and kept[0] == state:
            return kept[1]
        merged = torch.addmm(layer.weight, layer.lora_B, layer.lora_A, alpha=layer.scaling)
        self._merged[id(layer)] = state, merged
        return merged

    def forget_after_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        """Drop the merged weights: a hook for after an optimizer's step."""
        self._merged.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Leave a copied model on the reference: its layers are others."""
        return


def share_inputs(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Products]:
    """Put every ReLoRA layer of the model on the fast path; return how each multiplies, by module name.

    optimizer: the one that updates the layers. Given it, merged weights may be kept, which takes as much memory again
    as the wrapped weights. Without it nobody could tell that they are out of date: fused optimizers change parameters
    without a trace.
    """
    chosen: dict[str, Products] = {}
    for names, layers in _groups(model):
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
            optimizer.register_step_post_hook(shared.forget_after_step)
        for name, layer in zip(names, layers, strict=True):
            layer.shared = shared
            chosen[name] = products
    return chosen


def stop_sharing(model: nn.Module) -> None:
    """Put every layer back on the reference."""
    for _, layer in relora_layers(model):
        layer.shared = None


def _groups(model: nn.Module) -> list[tuple[tuple[str, ...], list[ReLoRALinear]]]:
    """Return the layers with their names, siblings together, in the model's order."""
    layers = dict(relora_layers(model))
    groups: list[tuple[tuple[str, ...], list[ReLoRALinear]]] = []
    for names in sibling_groups(list(layers)):
        together = [layers[name] for name in names]
        if all(_alike(together[0], other) for other in together):
            groups.append((names, together))
        else:
            groups += [((name,), [layers[name]]) for name in names]
    return groups


def _alike(one: ReLoRALinear, other: ReLoRALinear) -> bool:
    def facts(layer: ReLoRALinear) -> tuple[object, ...]:
        return layer.in_features, layer.rank, layer.scaling, layer.dropout, layer.weight.dtype

    return facts(one) == facts(other)
