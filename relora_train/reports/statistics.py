"""Means over seeds with their standard errors, and differences paired by seed. Pure.

One value has a mean and no error: nothing here invents one. Values that are not finite must be left out by the caller,
who then says how many runs a mean is over.
"""

import math
from collections.abc import Mapping, Sequence

from pydantic import Field

from relora_train.settings.base import FrozenConfig


class Estimate(FrozenConfig):
    """A mean over independent runs."""

    mean: float
    standard_error: float | None = Field(ge=0)
    """Sample standard deviation (n − 1) over √n; None for one value."""

    count: int = Field(ge=1)

    def differs_from_zero(self) -> bool:
        """Return True if the mean of three values or more lies above two standard errors from 0."""
        return self.standard_error is not None and self.count > 2 and abs(self.mean) > 2 * self.standard_error


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return mean and standard error; None for no values."""
    count = len(values)
    if count == 0:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean=mean, standard_error=None, count=1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean=mean, standard_error=math.sqrt(variance / count), count=count)


def paired_difference(ours: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Return the mean of ours − reference over the seeds that both have, with its error; None if there is no such seed.

    The seed's part in both (order of the data, first weights) cancels, so the error is that of the effect alone.
    """
    return estimate([ours[seed] - reference[seed] for seed in sorted(ours.keys() & reference.keys())])
