"""Settings of how weights change: low-rank update, optimizer, its reset, what is done about divergence."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from relora_train.settings.base import FrozenConfig

DropoutMask = Literal["stream", "hash"]


class ReLoRAConfig(FrozenConfig):
    """The low-rank update of methods 'relora' and 'lora'."""

    rank: int = Field(32, ge=1)
    """Rows of A and columns of B."""

    alpha: float = Field(32.0, gt=0)
    """Numerator of the scaling."""

    rank_stabilized: bool = False
    """Scaling alpha / sqrt(rank) instead of alpha / rank."""

    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the input of A."""

    dropout_mask: Literal["auto", "stream", "hash"] = "auto"
    """Source of dropout's masks. 'hash' compiles and is the same on all devices; 'stream' is the eager path's own.
    'auto' is settled at a run's start, 'hash' where it compiles, and kept for all its stages."""

    target_modules: tuple[str, ...] | None = None
    """Name endings of the linear layers to wrap; attention and MLP of the model's family when absent."""


class OptimizerConfig(FrozenConfig):
    """AdamW."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of the cycles, or of the whole run of method 'full'."""

    warm_start_learning_rate: float | None = Field(None, gt=0)
    """Peak of the warm start; half the learning rate when absent (the paper's rule)."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""

    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on matrices; not on norms and biases."""

    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""

    @model_validator(mode="after")
    def betas_are_below_one(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class OptimizerResetConfig(FrozenConfig):
    """The reset of Adam's state of A and B at a merge."""

    mode: Literal["none", "zero", "magnitude", "random"] = "magnitude"
    """'magnitude' keeps the largest first moments, 'random' a random share, 'zero' nothing."""

    ratio: float = Field(0.99, ge=0, le=1)
    """Share that is zeroed by 'magnitude' and 'random'."""

    independent_masks: bool = False
    """Prune both moments by masks of their own, as the paper's code does; can diverge."""

    restart_clock: bool = False
    """Adam's step of A and B begins anew too, as 'zero' always does: emptied entries then move by the rate at first."""

    @model_validator(mode="after")
    def clock_restarts_with_a_reset(self) -> Self:
        if self.restart_clock and self.mode == "none":
            raise ValueError("restart_clock needs a reset, and mode 'none' has none; take another mode")
        return self


class DivergenceConfig(FrozenConfig):
    """The answer to a stage whose loss explodes. Changes no weight of a stage that does not."""

    on_divergence: Literal["fail", "lower_lr"] = "fail"
    """'fail' ends the run there; 'lower_lr' trains the stage again from its parent at a lower learning rate."""

    factor: float = Field(0.5, gt=0, lt=1)
    """Each further attempt of the stage runs at this share of the last one's rate; later stages at the profile's."""

    max_retries: int = Field(2, ge=1, le=20)
    """Attempts at a lower rate, after which the run fails."""
