"""Settings of when: warm start, cycles, warm-ups."""

from __future__ import annotations

import itertools
import math
from typing import Self

from pydantic import Field, model_validator

from relora_train.settings.base import FrozenConfig


class ScheduleConfig(FrozenConfig):
    """Steps of every phase. A step is one optimizer update."""

    warm_start_steps: int = Field(200, ge=0)
    """Full-rank steps before the first cycle."""

    cycles: int = Field(4, ge=1)
    """Cycles of low-rank training, each ended by a merge."""

    cycle_length: int = Field(200, ge=2)
    """Steps between two merges."""

    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up at the start of the warm start and again of the first cycle."""

    restart_warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate climbs back after a merge."""

    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step relative to its peak."""

    jagged: bool = True
    """The rate falls to 0 at every merge and climbs back; without it, one cosine goes through all cycles."""

    horizon: int | None = Field(None, ge=1)
    """Cycles for which the cosine is drawn; `cycles` when absent. Beyond it the rate stays at min_lr_ratio."""

    cycle_growth: float = Field(1.0, gt=0)
    """Length of a cycle over that of the one before; together they keep cycles x cycle_length steps."""

    @model_validator(mode="after")
    def cycles_that_grow_have_no_other_horizon(self) -> Self:
        if self.horizon is not None and self.cycle_growth != 1:
            raise ValueError(
                f"horizon {self.horizon} counts cycles of one length, and cycle_growth {self.cycle_growth:g} shares "
                "the steps among all cycles; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def warmups_fit_in_a_cycle(self) -> Self:
        if self.cycle_growth != 1:
            return self
        if self.restart_warmup_steps >= self.cycle_length:
            raise ValueError(
                f"restart_warmup_steps {self.restart_warmup_steps} must be below cycle_length {self.cycle_length}"
            )
        if self.warmup_steps > self.cycle_length:
            raise ValueError(f"warmup_steps {self.warmup_steps} must not exceed cycle_length {self.cycle_length}")
        return self

    @model_validator(mode="after")
    def warmups_fit_in_grown_cycles(self) -> Self:
        lengths = [end - start for start, end in itertools.pairwise(self.cycle_bounds)]
        what = f"cycle_growth {self.cycle_growth:g} makes cycles of {', '.join(map(str, lengths))} steps"
        if min(lengths) < 2:
            raise ValueError(f"{what}; each needs 2 at least")
        if self.restart_warmup_steps >= min(lengths):
            raise ValueError(f"{what}; restart_warmup_steps {self.restart_warmup_steps} must be below each")
        if self.warmup_steps > lengths[0]:
            raise ValueError(f"{what}; warmup_steps {self.warmup_steps} must not exceed the first")
        return self

    @property
    def cycle_bounds(self) -> tuple[int, ...]:
        """Steps of the low-rank phase after which each cycle begins, and after which the last one ends."""
        if self.cycle_growth == 1:
            return tuple(cycle * self.cycle_length for cycle in range(self.cycles + 1))
        shares = [math.expm1(k * math.log(self.cycle_growth)) for k in range(self.cycles + 1)]  # 1 + g + g² + …, scaled
        return tuple(round(self.phase_steps * share / shares[-1]) for share in shares)

    @property
    def phase_steps(self) -> int:
        """Steps of all cycles."""
        return self.cycles * self.cycle_length

    @property
    def horizon_steps(self) -> int:
        """Steps of the low-rank phase at which the cosine ends."""
        return (self.horizon or self.cycles) * self.cycle_length

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.warm_start_steps + self.phase_steps
