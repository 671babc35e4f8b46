"""The learning rate and the cycle of every step, as pure functions: resuming needs no scheduler state.

Two ways to count, as in the paper's code. A learning rate belongs to an update that is about to happen, so its `step`
counts the updates done before it, from 0. A merge belongs to an update that has just happened, so there `step` counts
from 1. Update number n therefore runs at `learning_rate(n - 1, ...)`; a merge follows it if `is_merge_step(n, ...)`.
"""

from __future__ import annotations

import math


def is_merge_step(step: int, *, warm_start_steps: int, cycle_length: int) -> bool:
    """Whether the update just finished closes a cycle. Steps count from 1."""
    _check_cycles(step, warm_start_steps, cycle_length)
    return step > warm_start_steps and (step - warm_start_steps) % cycle_length == 0


def cycle_of_step(step: int, *, warm_start_steps: int, cycle_length: int) -> int:
    """The cycle that the update just finished belongs to, from 1; 0 in the warm start. Steps count from 1.

    Cycle k covers the steps warm_start_steps + (k - 1) * cycle_length + 1 to warm_start_steps + k * cycle_length.
    """
    _check_cycles(step, warm_start_steps, cycle_length)
    if step <= warm_start_steps:
        return 0
    return (step - warm_start_steps - 1) // cycle_length + 1


def cosine(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """The factor of one linear warm-up and one cosine decay from 1 to min_lr_ratio. Steps count from 0."""
    _check_step(step, total_steps=total_steps)
    _check_decay(warmup_steps, min_lr_ratio)
    if warmup_steps > total_steps:
        raise ValueError(f"warmup_steps = {warmup_steps} is more than total_steps = {total_steps}")
    if step < warmup_steps:
        return step / warmup_steps
    return _decay(step - warmup_steps, total_steps - warmup_steps, min_lr_ratio)


def jagged_cosine(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    restart_warmup_steps: int,
    cycle_length: int,
    min_lr_ratio: float,
) -> float:
    """The factor of the ReLoRA phase: a cosine that falls to 0 after every merge and climbs back linearly.

    `step` counts from 0 inside the phase, `total_steps` is the phase's length, and every climb ends on the cosine: the
    update right after a merge runs at 0 when restart_warmup_steps > 0. Source: `cosine_restarts` of Guitaricet/relora.
    """
    _check_step(step, total_steps=total_steps)
    check_jagged_cosine(
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        restart_warmup_steps=restart_warmup_steps,
        cycle_length=cycle_length,
        min_lr_ratio=min_lr_ratio,
    )
    return climbing_cosine(
        step,
        cycle_start=step - step % cycle_length,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        restart_warmup_steps=restart_warmup_steps,
        min_lr_ratio=min_lr_ratio,
    )


def climbing_cosine(
    step: int,
    *,
    cycle_start: int,
    total_steps: int,
    warmup_steps: int,
    restart_warmup_steps: int,
    min_lr_ratio: float,
) -> float:
    """The same for a cycle of any length that began at cycle_start; 0 for the first, which climbs by warmup_steps.

    Beyond total_steps the cosine stays at its end.
    """
    _check_step(min(step, total_steps), total_steps=total_steps)
    if not 0 <= cycle_start <= step:
        raise ValueError(f"cycle_start = {cycle_start} is not between 0 and step = {step}")
    if step < warmup_steps:
        return step / warmup_steps
    decay_steps = total_steps - warmup_steps
    step_in_cycle = step - cycle_start
    if cycle_start and step_in_cycle < restart_warmup_steps:
        end_of_climb = cycle_start + restart_warmup_steps
        return step_in_cycle / restart_warmup_steps * _decay(end_of_climb - warmup_steps, decay_steps, min_lr_ratio)
    return _decay(step - warmup_steps, decay_steps, min_lr_ratio)


def check_jagged_cosine(
    *, total_steps: int, warmup_steps: int, restart_warmup_steps: int, cycle_length: int, min_lr_ratio: float
) -> None:
    """Refuse settings whose jumps would not fall on the merges, or that leave a cycle no step at its full rate."""
    _check_decay(warmup_steps, min_lr_ratio)
    if cycle_length < 1:
        raise ValueError(f"cycle_length = {cycle_length} is less than 1")
    if total_steps < 1 or total_steps % cycle_length != 0:
        raise ValueError(f"total_steps = {total_steps} is not a positive multiple of cycle_length = {cycle_length}")
    if warmup_steps > cycle_length:
        raise ValueError(f"warmup_steps = {warmup_steps} is more than cycle_length = {cycle_length}")
    if restart_warmup_steps < 0:
        raise ValueError(f"restart_warmup_steps = {restart_warmup_steps} is negative")
    if restart_warmup_steps >= cycle_length:
        raise ValueError(
            f"restart_warmup_steps = {restart_warmup_steps} does not fit in a cycle: it must be less than "
            f"cycle_length = {cycle_length}"
        )


def learning_rate(
    step: int,
    *,
    warm_start_steps: int,
    total_steps: int,
    warmup_steps: int,
    restart_warmup_steps: int,
    cycle_length: int,
    min_lr_ratio: float,
    warm_start_learning_rate: float,
    learning_rate: float,
) -> float:
    """The learning rate of one update of a ReLoRA run. Steps count from 0 at the start of the warm start.

    The warm start follows a plain cosine over the whole run and is stopped early; the ReLoRA phase then has a warm-up
    and a cosine of its own over what is left of total_steps. Both use the same warmup_steps and min_lr_ratio.
    """
    _check_step(step, total_steps=total_steps)
    if not 0 <= warm_start_steps <= total_steps:
        raise ValueError(f"warm_start_steps = {warm_start_steps} is not between 0 and total_steps = {total_steps}")
    if step < warm_start_steps or warm_start_steps == total_steps:
        return warm_start_learning_rate * cosine(
            step, total_steps=total_steps, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio
        )
    return learning_rate * jagged_cosine(
        step - warm_start_steps,
        total_steps=total_steps - warm_start_steps,
        warmup_steps=warmup_steps,
        restart_warmup_steps=restart_warmup_steps,
        cycle_length=cycle_length,
        min_lr_ratio=min_lr_ratio,
    )


def _decay(step: int, total_steps: int, min_lr_ratio: float) -> float:
    """Half a cosine wave from 1 at step 0 to min_lr_ratio at total_steps, and on at that."""
    progress = min(1.0, step / max(1, total_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _check_decay(warmup_steps: int, min_lr_ratio: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps = {warmup_steps} is negative")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio = {min_lr_ratio} is not between 0 and 1")


def _check_step(step: int, *, total_steps: int) -> None:
    # step == total_steps has a value too: a loop may ask for the rate of the update after its last one.
    if total_steps < 1:
        raise ValueError(f"total_steps = {total_steps} is less than 1")
    if not 0 <= step <= total_steps:
        raise ValueError(f"step = {step} is not between 0 and total_steps = {total_steps}")


def _check_cycles(step: int, warm_start_steps: int, cycle_length: int) -> None:
    if step < 0:
        raise ValueError(f"step = {step} is negative")
    if warm_start_steps < 0:
        raise ValueError(f"warm_start_steps = {warm_start_steps} is negative")
    if cycle_length < 1:
        raise ValueError(f"cycle_length = {cycle_length} is less than 1")
