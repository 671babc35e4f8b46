"""Settings of the model, and of how its weights change and when: schedule, low-rank update, optimizer, divergence."""

import itertools
import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from relora_train.settings.base import Address, FrozenConfig

DropoutMask = Literal["stream", "hash"]


class ModelConfig(FrozenConfig):
    """The model: a Llama of this shape, or one to continue from."""

    pretrained: Address | None = None
    """Local directory or hub id to continue from; the shape below is then ignored."""

    revision: str | None = None
    """Hub revision of `pretrained`."""

    hidden_size: int = Field(256, ge=8)
    """Width of the residual stream."""

    intermediate_size: int = Field(688, ge=8)
    """Width inside the MLP."""

    num_hidden_layers: int = Field(4, ge=1)
    """Number of transformer blocks."""

    num_attention_heads: int = Field(4, ge=1)
    """Attention heads; must divide hidden_size."""

    num_key_value_heads: int | None = Field(None, ge=1)
    """Heads of keys and values; as many as attention heads when absent."""

    vocab_size: int | None = Field(None, ge=2)
    """Rows of the embedding; the tokenizer's size when absent, never less than it."""

    max_position_embeddings: int = Field(1024, ge=8)
    """Longest sequence the model is made for."""

    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""

    rms_norm_eps: float = Field(1e-6, gt=0)
    """Added to the variance in RMSNorm."""

    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary position embedding."""

    tie_word_embeddings: bool = False
    """Share one matrix between embedding and head."""

    @model_validator(mode="after")
    def heads_divide_the_width_evenly(self) -> Self:
        if self.pretrained is not None:
            return self
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} in {self.num_attention_heads} heads makes heads of {self.head_size}; "
                "rotary positions need an even number"
            )
        kv_heads = self.num_key_value_heads
        if kv_heads and self.num_attention_heads % kv_heads:
            raise ValueError(f"{self.num_attention_heads} attention heads are not a multiple of {kv_heads} kv heads")
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


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
    def horizon_and_warmups_fit_the_cycles(self) -> Self:
        if self.horizon is not None and self.cycle_growth != 1:
            raise ValueError(
                f"horizon {self.horizon} counts cycles of one length, and cycle_growth {self.cycle_growth:g} shares "
                "the steps among all cycles; leave one of them out"
            )
        lengths = [end - start for start, end in itertools.pairwise(self.cycle_bounds)]
        what, each, first = "", f"cycle_length {self.cycle_length}", f"cycle_length {self.cycle_length}"
        if self.cycle_growth != 1:
            what = f"cycle_growth {self.cycle_growth:g} makes cycles of {', '.join(map(str, lengths))} steps; "
            each, first = "each", "the first"
        if min(lengths) < 2:
            raise ValueError(f"{what}each needs 2 at least")
        if self.restart_warmup_steps >= min(lengths):
            raise ValueError(f"{what}restart_warmup_steps {self.restart_warmup_steps} must be below {each}")
        if self.warmup_steps > lengths[0]:
            raise ValueError(f"{what}warmup_steps {self.warmup_steps} must not exceed {first}")
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


class TrainConfig(FrozenConfig):
    """The parameters that low-rank stages train in full beside A and B; the paper's choice is all of them."""

    embeddings: bool = True
    """Tables of tokens, positions and patches; a head that is the same matrix goes with them."""

    head: bool = True
    """The output head."""

    norms: bool = True
    """Scales and biases of norms."""

    biases: bool = True
    """Biases of linear layers, wrapped or not."""

    others: bool | Literal["auto"] = "auto"
    """Whatever else is not wrapped: linear layers, routers, convolutions. 'auto' trains it unless target_modules is
    set."""


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
    """Name endings of the linear layers to wrap; all those inside the model's repeated blocks when absent."""

    train: TrainConfig = TrainConfig()
    """The kinds of other parameters that are trained in full; a kind set to false stays as it is in low-rank stages."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """The kinds that low-rank stages leave as they are."""
        trained = self.train.model_dump()
        if self.train.others == "auto":
            trained["others"] = self.target_modules is None
        return tuple(kind for kind, trains in trained.items() if not trains)


class OptimizerConfig(FrozenConfig):
    """AdamW, or a rival of it that holds less."""

    kind: Literal["adamw", "factored", "galore", "fira"] = "adamw"
    """The update of all but A and B. 'factored': second moments of rows and columns, no momentum. 'galore', 'fira':
    Adam in a subspace of each matrix that ReLoRA would wrap, for method 'full'."""

    low_rank_state: Literal["adam", "factored"] = "adam"
    """The state of A and B: Adam's, or second moments of rows and columns, without momentum."""

    subspace_rank: int = Field(128, ge=1)
    """Directions of a gradient that 'galore' and 'fira' keep."""

    subspace_steps: int = Field(200, ge=1)
    """Steps after which 'galore' and 'fira' take the subspace of a new gradient."""

    subspace_scale: float = Field(0.25, gt=0)
    """Rate of the matrices that 'galore' and 'fira' project over the learning rate, which is the others'."""

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

    state: Literal["float32", "8bit"] = "float32"
    """Both moments; '8bit' holds those of large tensors in a quarter of the memory, by bitsandbytes."""

    max_grad_norm: Annotated[float | None, BeforeValidator(lambda n: None if n == "off" else n)] = Field(1.0, gt=0)
    """Gradients are clipped to this global norm; 'off' clips none."""

    in_backward: bool = False
    """A parameter moves within the backward pass, and its gradient is freed: for method 'full', without clipping."""

    @model_validator(mode="after")
    def betas_are_below_one(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self

    @property
    def projects(self) -> bool:
        """True if matrices are updated in a subspace."""
        return self.kind in ("galore", "fira")

    @property
    def has_rules(self) -> bool:
        """True if anything is updated otherwise than by AdamW (method/rules.py)."""
        return self.kind != "adamw" or self.low_rank_state != "adam"


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
