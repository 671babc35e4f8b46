"""The learning rate of every update, as a pure function: resuming needs no scheduler state.

A warm start follows a plain cosine over the whole run and is stopped early. The cycles then have a warm-up and a cosine
of their own; after every merge the rate falls to 0 and climbs back. ScheduleConfig refuses what does not fit together.
"""

import math

from relora_train.method.stages import Stage
from relora_train.settings.profile import Profile


def learning_rate(profile: Profile, stage: Stage, step: int) -> float:
    """Return the learning rate of update `step`, counted from 1: a function of profile, stage and step alone.

    A rate belongs to an update that is about to happen, so the curves below count the updates done before it, from 0.
    """
    schedule, optimizer = profile.schedule, profile.optimizer
    done = stage.phase_step + step - 1 - stage.start_step
    if stage.low_rank:
        # A LoRA is a single cycle, so it never restarts; nor do cycles without schedule.jagged.
        restarts = stage.kind == "relora" and schedule.jagged
        return optimizer.learning_rate * jagged_cosine(
            done,
            cycle_start=stage.phase_step if restarts else 0,
            total_steps=schedule.horizon_steps,
            warmup_steps=schedule.warmup_steps,
            restart_warmup_steps=schedule.restart_warmup_steps,
            min_lr_ratio=schedule.min_lr_ratio,
        )
    peak = optimizer.learning_rate if stage.kind == "full" else profile.warm_start_learning_rate
    return peak * cosine(
        done,
        total_steps=schedule.warm_start_steps + schedule.horizon_steps,
        warmup_steps=schedule.warmup_steps,
        min_lr_ratio=schedule.min_lr_ratio,
    )


def jagged_cosine(
    step: int,
    *,
    cycle_start: int,
    total_steps: int,
    warmup_steps: int,
    restart_warmup_steps: int,
    min_lr_ratio: float,
) -> float:
    """Return the factor of the ReLoRA phase: a cosine that falls to 0 after every merge and climbs back linearly.

    `step` counts from 0 inside the phase, and its cycle began at `cycle_start`: 0 for the first, which climbs by
    warmup_steps. Every climb ends on the cosine. Source: `cosine_restarts` of Guitaricet/relora.
    """
    step_in_cycle = step - cycle_start
    if cycle_start and step_in_cycle < restart_warmup_steps:
        top = cosine(cycle_start + restart_warmup_steps, total_steps, warmup_steps, min_lr_ratio)
        return step_in_cycle / restart_warmup_steps * top
    return cosine(step, total_steps, warmup_steps, min_lr_ratio)


def cosine(step: int, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Return the factor of one linear warm-up and one cosine decay from 1 to min_lr_ratio, and on at that."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
