"""How many of a run's low-rank directions each layer gets: alike, or by the rank of what the warm start changed in it.

The warm start trained every weight in full: where its update W - W_0 spread over many directions, a low-rank update
needs many. Ranks follow the update's effective rank, with as many parameters in all as the uniform rank has. W_0 is
made again from the run's seed, one layer's singular values are computed at a time, on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from relora_train.errors import ConfigError
from relora_train.method.relora import effective_rank

Shape = tuple[int, int]
"""(out, in) of a weight."""


def allocate_ranks(weights: Mapping[str, float], shapes: Mapping[str, Shape], *, rank: int) -> dict[str, int]:
    """A rank for each layer, in proportion to its weight as far as the bounds let, by layer in the given order.

    At least 1 and at most the layer's smaller side each; all factors together have at most as many parameters as with
    the uniform rank for all, which is what comes out where no weight is above zero. Pure.
    """
    sides = {name: sum(shape) for name, shape in shapes.items()}
    most = {name: min(shape) for name, shape in shapes.items()}
    budget = rank * sum(sides.values())
    if sum(weights.values()) <= 0:
        return dict.fromkeys(shapes, rank)

    def wanted(scale: float) -> dict[str, float]:
        return {name: min(max(scale * weights[name], 1.0), most[name]) for name in shapes}

    low, high = 0.0, max(most.values()) / min(weight for weight in weights.values() if weight > 0)
    for _ in range(100):  # the cost rises with the scale: halve the interval
        scale = (low + high) / 2
        over = sum(sides[name] * share for name, share in wanted(scale).items()) > budget
        low, high = (low, scale) if over else (scale, high)
    shares = wanted(low)
    ranks = {name: int(share) for name, share in shares.items()}
    left = budget - sum(sides[name] * ranks[name] for name in shapes)
    for name in sorted(shapes, key=lambda name: (ranks[name] - shares[name], name)):  # the largest remainder first
        if sides[name] <= left and ranks[name] < most[name]:
            ranks[name] += 1
            left -= sides[name]
    return ranks


@torch.no_grad()
def ranks_from_warm_start(after: nn.Module, before: nn.Module, names: list[str], *, rank: int) -> dict[str, int]:
    """Ranks by the effective rank of what a warm start changed in each of these layers; both models on the CPU.

    Raises ConfigError where nothing was changed: then there is no spectrum to go by.
    """
    found: dict[str, float] = {}
    shapes: dict[str, Shape] = {}
    for name in names:
        weight: Tensor = after.get_submodule(name).weight  # type: ignore[assignment]  # they are linear layers
        first: Tensor = before.get_submodule(name).weight  # type: ignore[assignment]
        shapes[name] = weight.shape[0], weight.shape[1]
        found[name] = effective_rank(torch.linalg.svdvals((weight - first).double()))
    if not any(found.values()):
        raise ConfigError(
            "relora.rank_allocation = 'warm-start-spectrum' found every weight as it was initialised: there was no "
            "warm start. Set schedule.warm_start_steps, or rank_allocation = 'uniform'."
        )
    return allocate_ranks(found, shapes, rank=rank)
