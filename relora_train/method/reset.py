"""The partial reset of Adam's state at a merge."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from relora_train.distributed import full_tensor, local_shard, shard_of
from relora_train.method.layer import stable_generator

ResetMode = Literal["none", "zero", "magnitude", "random"]

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ResetReport:
    """The part of the optimizer state that a reset emptied. Both moments count."""

    entries: int
    zeroed: int

    @property
    def share_zeroed(self) -> float:
        """Share of the entries looked at, 0 to 1; 0 if there were none."""
        return self.zeroed / self.entries if self.entries else 0.0


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """Return exp_avg and exp_avg_sq of a parameter with state; those held as codes (eight_bit_adamw.py) in float32.

    Under a rule (rules.py) it is what that holds in their place.
    """
    if hasattr(optimizer, "read"):
        return cast(Any, optimizer).read(parameter)  # type: ignore[no-any-return]
    state = optimizer.state[parameter]
    return [state[key] for key in (MOMENTS if MOMENTS[0] in state else state) if key != "step"]


@torch.no_grad()
def reset_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[tuple[str, Tensor] | Tensor],
    *,
    mode: ResetMode,
    ratio: float,
    independent_masks: bool = False,
    restart_clock: bool = False,
    seed: int = 0,
    cycle: int = 0,
) -> ResetReport:
    """Empty the moments of these parameters, wholly or in part; each tensor is pruned on its own.

    - none: nothing. zero: both moments and Adam's step; `ratio` is not used.
    - magnitude: keep entries whose |exp_avg| lies strictly above the `ratio` quantile of |exp_avg|; all at ratio 0.
    - random: keep an entry where a uniform draw u > ratio, drawn on the CPU from (seed, cycle, parameter name).

    One mask serves both moments. `independent_masks` gives the paper's literal behaviour, a mask for each moment: then
    most entries that keep exp_avg have lost exp_avg_sq, and their next update is of the order lr * exp_avg / eps.
    `parameters` may be named, as from lora_parameters(); unnamed ones are called by their position. A parameter
    without state, one that was never updated, is left alone. A sharded moment is pruned by the mask that it would have
    whole: it is gathered, one tensor at a time.

    Adam's step is kept except by zero, as in the paper's code. So bias correction counts an emptied entry's moments as
    full ones. Its first updates are (1 - beta1) / sqrt(1 - beta2) = 3.2 times the rate; with `restart_clock`, which
    begins each parameter's step anew, 1.0 times. A factored state (factored.py) has no entries of its own to keep: all
    modes but none empty it, with its step.
    """
    if mode not in get_args(ResetMode):
        raise ValueError(f"mode = {mode!r} is not one of {', '.join(get_args(ResetMode))}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio = {ratio} is not between 0 and 1")
    entries = zeroed = 0
    for index, item in enumerate(parameters):
        name, parameter = (str(index), item) if isinstance(item, Tensor) else item
        state = optimizer.state.get(parameter)
        if not state:
            continue
        moments = moments_of(optimizer, parameter)
        factored = MOMENTS[0] not in state
        each: ResetMode = "zero" if factored and mode != "none" else mode
        entries += sum(moment.numel() for moment in moments)
        if each == "zero" or restart_clock:
            state["step"].zero_()
        generator = stable_generator(seed, cycle, name)
        apart = independent_masks or factored  # whose means differ in shape
        masks = _masks([full_tensor(moment) for moment in moments], each, ratio, apart, generator)
        for moment, keep in zip(moments, masks, strict=True):
            local_shard(moment).masked_fill_(~shard_of(keep, moment), 0)
            zeroed += int(keep.numel() - keep.count_nonzero())
        if hasattr(optimizer, "write"):
            cast(Any, optimizer).write(parameter, moments)
    return ResetReport(entries=entries, zeroed=zeroed)


def _masks(
    moments: list[Tensor], mode: ResetMode, ratio: float, independent: bool, generator: torch.Generator
) -> list[Tensor]:
    """Return, for each moment, True where it is kept."""

    def mask(moment: Tensor) -> Tensor:
        if moment.ndim == 3:  # a matrix of each expert
            return torch.stack([mask(each) for each in moment])
        if ratio == 0 and mode != "zero":  # the least entry is not above itself
            return torch.ones_like(moment, dtype=torch.bool)
        if mode == "magnitude":
            return above_quantile(moment.abs(), ratio)
        if mode == "random":
            return (torch.rand(moment.shape, generator=generator) > ratio).to(moment.device)
        return torch.full_like(moment, mode == "none", dtype=torch.bool)

    return [mask(moment) for moment in moments] if independent else [mask(moments[0])] * len(moments)


def above_quantile(values: Tensor, ratio: float) -> Tensor:
    """Return True where a value is strictly above the linearly interpolated quantile; exact, at any tensor size.

    The quantile lies between two neighbours in sorted order, the lower one included and the upper one not. So a value
    is above it exactly when it is above the lower neighbour: nothing is interpolated and nothing rounded.
    torch.quantile refuses tensors above 2**24 elements, and in float32 its rank is a rounded one.
    """
    if values.numel() == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    flat = values.flatten()
    # The ratio counts as the decimal that was written: 0.29 of 101 values is rank 29, not 28.999...
    rank = math.floor(Fraction(str(ratio)) * (len(flat) - 1))
    if flat.device.type == "cpu":
        return values > flat.kthvalue(rank + 1).values
    return values > flat.sort().values[rank]  # torch has no deterministic kthvalue on CUDA
