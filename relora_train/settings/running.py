"""Settings of how a run goes: numbers, evaluation, records, processes, what is kept."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from relora_train.settings.base import FrozenConfig, WithoutSecrets


class PrecisionConfig(FrozenConfig):
    """Numbers the model computes with. Checkpoints are fp32 whatever is chosen here."""

    dtype: Literal["float32", "bfloat16", "pure-bfloat16"] = "float32"
    """'bfloat16': autocast, frozen weights rounded; 'pure-bfloat16': trained matrices, gradients, Adam's state too."""

    matmul_precision: Literal["auto", "highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision; 'auto': 'medium' where a run's first stage finds it as exact as float32."""

    frozen: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"
    """The wrapped weights on a device; 'auto' follows dtype. Rounded ones are merged in float32 and rounded again."""

    residual: Literal["float32", "bfloat16"] = "float32"
    """Residual stream between blocks in training; 'bfloat16' halves its memory and traffic, and rounds it."""

    deterministic: bool = True
    """Deterministic kernels where there is a choice (always so on CPU)."""

    @model_validator(mode="after")
    def a_rounded_residual_goes_with_rounded_products(self) -> Self:
        if self.residual == "bfloat16" and not self.computes_in_bfloat16:
            raise ValueError("residual 'bfloat16' needs dtype 'bfloat16' or 'pure-bfloat16'")
        return self

    @property
    def frozen_as(self) -> Literal["float32", "bfloat16", "int8", "nf4"]:
        """The form in which a device holds the wrapped weights."""
        if self.frozen != "auto":
            return self.frozen
        return "bfloat16" if self.computes_in_bfloat16 else "float32"

    @property
    def rounds_others(self) -> bool:
        """True if frozen matrices that are not wrapped are held in bfloat16: products round them anyway."""
        return self.computes_in_bfloat16 and self.frozen_as != "float32"

    @property
    def computes_in_bfloat16(self) -> bool:
        """True if forward passes run under autocast."""
        return self.dtype != "float32"

    @property
    def trains_in_bfloat16(self) -> bool:
        """True if trained matrices, their gradients and Adam's state are held in bfloat16."""
        return self.dtype == "pure-bfloat16"


class EvaluationConfig(FrozenConfig):
    """Held-out evaluation. Changes no weight."""

    sequences: int = Field(256, ge=1)
    """Validation sequences scored before and after each stage; fewer when the split is smaller."""

    final_sequences: int = Field(4096, ge=1)
    """Validation sequences scored by the evaluation task."""

    batch_sequences: int = Field(32, ge=1)
    """Sequences in one forward pass."""

    sample_prompts: tuple[str, ...] = ()
    """Texts the model continues after the warm start and after the last cycle."""

    sample_tokens: int = Field(48, ge=1)
    """Tokens of a continuation."""


class LoggingConfig(FrozenConfig):
    """The records of a running stage. Changes no weight."""

    every_steps: int = Field(10, ge=1)
    """Steps between two metric records."""


class SnapshotConfig(FrozenConfig):
    """Snapshots of a running stage, so that a killed stage repeats little. Changes no weight."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between two snapshots; not counted in steps when absent."""

    every_seconds: float | None = Field(300.0, gt=0)
    """Seconds between two snapshots; 1e9 leaves only the one at a stop."""

    keep: int = Field(2, ge=1)
    """Snapshots kept in the store, and on this machine while the store is away, until their stage is committed."""


class LaunchConfig(FrozenConfig):
    """The start of the trainer process. Changes no weight beyond float rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto' takes a GPU where there is one."""

    nproc_per_node: Annotated[int, Field(ge=1)] | Literal["gpu"] = 1
    """Ranks on a machine, by torch's elastic launcher; 'gpu' takes as many as there are GPUs when they start."""

    nnodes: int = Field(1, ge=1)
    """Machines; all but the flow's run `relora join` and see its cache and dataset under the same paths."""

    rdzv_endpoint: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+:\d{1,5}$"), WithoutSecrets()] | None = None
    """'host:port' at which the flow's machine is found by the others; needed with several."""

    sharding: Literal["none", "full"] = "none"
    """'full' spreads weights, gradients and optimizer over the ranks (FSDP2): for a model too large for one device."""

    threads: int | None = Field(None, ge=1)
    """CPU threads of a rank; torch's choice when absent."""

    compile: Literal["auto"] | bool = "auto"
    """torch.compile of the blocks for training, up to a minute a stage; 'auto': on a GPU with a compiler at hand."""

    recompute_elementwise: bool = True
    """Compiled blocks keep products for the backward pass and compute the rest again: about half the activations."""

    gradient_checkpointing: bool = False
    """Keep one activation a block and compute the rest again: far less memory, about a third more FLOPs."""

    @model_validator(mode="after")
    def ranks_can_start(self) -> Self:
        if self.nproc_per_node == "gpu" and self.device == "cpu":
            raise ValueError("nproc_per_node 'gpu' needs device 'cuda' or 'auto'")
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ValueError(f"nnodes {self.nnodes} needs rdzv_endpoint, 'host:port' of the flow's machine")
        return self

    def compiles_on(self, device: str) -> bool:
        """Return True if blocks are to be compiled on a device of this kind."""
        return self.compile is True or (self.compile == "auto" and device == "cuda")

    @property
    def world_size(self) -> int | None:
        """Ranks of a stage; None when only its start tells."""
        return None if self.nproc_per_node == "gpu" else self.nproc_per_node * self.nnodes


class RetentionConfig(FrozenConfig):
    """Checkpoints that `relora prune` and the flow `prune` keep; without a key, all of them. Changes no weight."""

    keep_last: int | None = Field(None, ge=1)
    """Keep the last so many of every line of checkpoints."""

    keep_every: int | None = Field(None, ge=1)
    """Also keep every so many-th cycle, the warm start included."""
