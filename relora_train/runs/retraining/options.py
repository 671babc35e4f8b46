"""The parameters of the flow `retrain`, with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from relora_train.errors import ConfigError
from relora_train.settings.base import FrozenConfig

Cycles = Annotated[int, Field(ge=1, le=1000, description="Cycles a retrain adds to its champion's")]
Margin = Annotated[float, Field(ge=0, le=10, description="By how much the validation loss must fall to be promoted")]
MarginKind = Annotated[
    Literal["relative", "absolute"],
    Field(description="relative: share of the champion's loss, below 1; absolute: nats per token"),
]
OldDataRatio = Annotated[
    float, Field(ge=0, lt=1, description="Share of the training text that is old data mixed in, against forgetting")
]


class RetrainOptions(FrozenConfig):
    """The options of a retrain."""

    cycles: Cycles = 1
    margin: Margin = 0.0
    margin_kind: MarginKind = "relative"
    old_data_ratio: OldDataRatio = 0.25
    fresh_warm_start: bool = False
    """Train the whole plan anew on all data, instead of going on from the champion."""
    retry_refused: bool = False
    """A refused candidate's data stays new: the next retrain takes it again, with what has come since."""

    @model_validator(mode="after")
    def relative_margin_is_below_one(self) -> Self:
        if self.margin_kind == "relative" and self.margin >= 1:
            raise ValueError(f"a relative margin of {self.margin:g} cannot be reached: it must be below 1")
        return self


def retrain_options(**options: Any) -> RetrainOptions:
    """Return checked options. Raise ConfigError with all faults at once."""
    try:
        return RetrainOptions(**options)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))} {fault['msg'].removeprefix('Value error, ')}".strip()
            for fault in error.errors()
        )
        raise ConfigError(f"The retrain's options are not valid: {faults}. Correct them and run again.") from None
