"""The size of single updates of A, B and the weight they stand for: a reset of the optimizer shows in the first ones.

Measuring an update costs one copy of A and B and a few device reads. Other updates are unaffected.
"""

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from relora_train.distributed import full_tensor, local_shard, norm
from relora_train.method.experts import ReLoRAExperts, expert_layers, low_rank_layers
from relora_train.method.layer import ReLoRALinear


class UpdateMeter:
    """Measures one update after another of a model's low-rank layers. All ranks of a sharded model call together."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(low_rank_layers(model).values())
        self._experts = [(owner.get_parameter(n.rpartition(".")[2]), each) for n, each, owner in expert_layers(model)]
        self._before: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """Remember A and B as they are."""
        self._before = [_factors(layer) for layer in self._layers]

    def end(self) -> dict[str, float]:
        """Return Frobenius norms, over all layers, of the changes since begin() of A, of B, and of scaling * B A.

        The last is relative to the frozen weights' norm.
        """
        squares = [0.0, 0.0, 0.0]
        for layer, (A, B) in zip(self._layers, self._before, strict=True):
            new_A, new_B = _factors(layer)
            # B'A' - BA = (B' - B) A' + B (A' - A): a product of 2r columns and rows, so no matrix (out, in) is made.
            change = layer.scaling * product_norm(
                torch.cat([new_B - B, B], dim=-1), torch.cat([new_A, new_A - A], dim=-2)
            )
            for i, size in enumerate((float((new_A - A).norm()), float((new_B - B).norm()), change)):
                squares[i] += size**2
        self._before = []
        a, b, weight = (math.sqrt(square) for square in squares)
        return {
            "lora_A_update_norm": a,
            "lora_B_update_norm": b,
            "relative_weight_change": weight / self._weight_norm,
        }

    @cached_property  # they are frozen
    def _weight_norm(self) -> float:
        layers = [layer for layer in self._layers if isinstance(layer, ReLoRALinear)]
        weights = [layer.weight if layer.scales is None else layer.frozen_matrix(torch.float32) for layer in layers]
        weights += [layer.exact(weight) for weight, layer in self._experts]
        return math.sqrt(sum(norm(local_shard(weight).float(), weight) ** 2 for weight in weights))


def product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of left (out, k) @ right (k, in), in float32, from k x k matrices."""
    R_left = torch.linalg.qr(left, mode="r").R
    R_right = torch.linalg.qr(right.mT, mode="r").R
    return float((R_left @ R_right.mT).norm())


def _factors(layer: ReLoRALinear | ReLoRAExperts) -> tuple[Tensor, Tensor]:
    return tuple(full_tensor(factor).detach().float().clone() for factor in (layer.lora_A, layer.lora_B))  # type: ignore[return-value]
