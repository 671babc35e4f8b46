"""A run's settings: frozen, bounded, explained where they are declared.

A profile is sparse TOML over these defaults; `--set section.key=value` goes over the profile. Unknown keys are
refused and all faults are shown at once. Light: imports no torch, boto3 or prefect.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from relora_train.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES, ObjectiveName, facts_of, foreign_keys

Method = Literal["full", "lora", "relora"]


class FrozenConfig(BaseModel):
    """Base of every section: immutable, numbers are finite, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(FrozenConfig):
    """The model: a Llama of this shape, or one to continue from."""

    pretrained: str | None = None
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
    def heads_divide_hidden_size(self) -> Self:
        if self.pretrained is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        return self

    @model_validator(mode="after")
    def heads_are_even_for_rotation(self) -> Self:
        if self.pretrained is None and self.head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} in {self.num_attention_heads} heads makes heads of {self.head_size}; "
                "rotary positions need an even number"
            )
        return self

    @model_validator(mode="after")
    def key_value_heads_divide_heads(self) -> Self:
        kv_heads = self.num_key_value_heads
        if self.pretrained is None and kv_heads and self.num_attention_heads % kv_heads:
            raise ValueError(f"{self.num_attention_heads} attention heads are not a multiple of {kv_heads} kv heads")
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_size(self) -> int:
        """Width of keys and values."""
        return self.head_size * (self.num_key_value_heads or self.num_attention_heads)


class TokenizerConfig(FrozenConfig):
    """The tokenizer: one to load, or a byte-level BPE trained on the training part."""

    path: str | None = None
    """tokenizer.json, directory or hub id to load; trained when absent."""

    vocab_size: int = Field(4096, ge=257)
    """Entries of a trained tokenizer, its end-of-text token included."""

    eos_token: str | None = None
    """The document separator; found by its usual names when absent ('<|endoftext|>' in a trained tokenizer)."""

    training_bytes: int = Field(200_000_000, ge=10_000)
    """Text a tokenizer is trained on at most."""


class DataConfig(FrozenConfig):
    """Where the text or the images come from and how they become shards."""

    name: str = Field("corpus", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Folder of the dataset in the store."""

    source: Literal["python-stdlib", "text", "jsonl", "parquet", "hub", "digits", "idx"] = "python-stdlib"
    """'python-stdlib' is the standard library's own source. Images: scikit-learn's 'digits', 'idx' of MNIST's kind."""

    paths: tuple[str, ...] = ()
    """Files, directories, globs or s3:// prefixes, for text, jsonl, parquet and idx."""

    hub_id: str | None = None
    """Dataset on the hub, for source 'hub'."""

    hub_config: str | None = None
    """Its configuration, such as 'en'."""

    hub_split: str = "train"
    """Its split."""

    hub_revision: str | None = None
    """Its revision; the newest when absent, recorded with the dataset."""

    text_field: str = "text"
    """Field of a document that holds its text."""

    max_documents: int | None = Field(None, ge=1)
    """Stop after so many documents, or training images, of the source."""

    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of documents or digits held out, chosen by a hash of their content; of idx it is the test files."""

    shard_tokens: int = Field(8_388_608, ge=1024)
    """Tokens a shard holds at most."""

    workers: int | None = Field(None, ge=1)
    """Processes that tokenize; one a core when absent. Does not change the result."""

    engine: Literal["auto", "tokenizers", "tiktoken"] = "auto"
    """Encoder; both give the same bytes."""

    @model_validator(mode="after")
    def source_has_what_it_needs(self) -> Self:
        if self.source in ("text", "jsonl", "parquet", "idx") and not self.paths:
            raise ValueError(f"source {self.source!r} needs paths")
        if self.source == "hub" and not self.hub_id:
            raise ValueError("source 'hub' needs hub_id")
        return self

    @model_validator(mode="after")
    def paths_have_a_reader(self) -> Self:
        if self.paths and self.source in ("python-stdlib", "hub", "digits"):
            raise ValueError(
                f"source {self.source!r} does not read paths; set source to one that does (text, jsonl, parquet, idx), "
                "or paths to []"
            )
        return self


class ImagesConfig(FrozenConfig):
    """Objective 'image_classification': what the images are, and how a vision transformer cuts them."""

    size: int = Field(8, ge=1)
    """Pixels of a side; images are square."""

    channels: int = Field(1, ge=1)
    """Values of a pixel."""

    classes: int = Field(10, ge=2, le=256)
    """What an image can be."""

    patch_size: int = Field(2, ge=1)
    """Pixels of a side of a patch. A patch is a token: batch.sequence_length is how many an image has."""

    @model_validator(mode="after")
    def patches_fill_the_image(self) -> Self:
        if self.size % self.patch_size:
            raise ValueError(f"size {self.size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def patches(self) -> int:
        """Of an image."""
        return (self.size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch_size**2


class BatchConfig(FrozenConfig):
    """Geometry of one optimizer update."""

    sequences: int = Field(32, ge=1)
    """Sequences in an update, over all ranks and micro-steps."""

    sequence_length: int = Field(256, ge=8)
    """Tokens in a sequence."""

    micro_sequences: int | None = Field(None, ge=1)
    """Sequences in one forward pass of one rank; all of a rank's share when absent."""

    @model_validator(mode="after")
    def micro_sequences_divide_sequences(self) -> Self:
        if self.micro_sequences and self.sequences % self.micro_sequences:
            raise ValueError(f"sequences {self.sequences} is not a multiple of micro_sequences {self.micro_sequences}")
        return self

    @property
    def tokens(self) -> int:
        """Tokens in an update."""
        return self.sequences * self.sequence_length

    def forward_passes(self, ranks: int) -> tuple[int, int]:
        """Sequences in a forward pass of the rank with the largest share, and its forward passes an update."""
        share = math.ceil(self.sequences / ranks)
        sequences = min(self.micro_sequences or share, share)
        return sequences, math.ceil(share / sequences)


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
    """Whether the rate falls to 0 at every merge and climbs back; without it, one cosine through all cycles."""

    cycle_growth: float = Field(1.0, gt=0)
    """Length of a cycle over that of the one before; together they keep cycles x cycle_length steps."""

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
        """Steps of all cycles; the horizon of the jagged cosine."""
        return self.cycles * self.cycle_length

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; the horizon of the warm start's cosine."""
        return self.warm_start_steps + self.phase_steps


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

    target_modules: tuple[str, ...] | None = None
    """Name endings of the linear layers to wrap; attention and MLP of the model's family when absent."""

    rank_allocation: Literal["uniform", "warm-start-spectrum"] = "uniform"
    """'warm-start-spectrum' shares the same number of parameters out by how many directions the warm start changed."""

    init: Literal["kaiming", "gradient"] = "kaiming"
    """What A starts a cycle as: random, or where the gradient of W over the cycle's first batch is largest."""

    merge_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers a merged weight is kept in; 'bfloat16' rounds it at every merge and loses small updates, to compare."""


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

    low_rank_lr_ratio: float = Field(1.0, gt=0)
    """Learning rate of A and B over that of what is trained beside them."""

    low_rank_b_lr_ratio: float = Field(1.0, gt=0)
    """Learning rate of B over that of A (LoRA+)."""

    @model_validator(mode="after")
    def betas_are_below_one(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class OptimizerResetConfig(FrozenConfig):
    """What happens to Adam's state of A and B at a merge."""

    mode: Literal["none", "zero", "magnitude", "random"] = "magnitude"
    """'magnitude' keeps the largest first moments, 'random' a random share, 'zero' nothing."""

    ratio: float = Field(0.99, ge=0, le=1)
    """Share that is zeroed by 'magnitude' and 'random'."""

    independent_masks: bool = False
    """Prune both moments by masks of their own, as the paper's code does; can diverge."""


class PrecisionConfig(FrozenConfig):
    """Numbers the model computes with. Checkpoints are fp32 whatever is chosen here."""

    dtype: Literal["float32", "bfloat16", "pure-bfloat16"] = "float32"
    """'bfloat16': autocast, frozen weights rounded; 'pure-bfloat16': trained matrices, gradients, Adam's state too."""

    matmul_precision: Literal["auto", "highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision; 'auto' measures at a run's start which is fastest at float32's accuracy."""

    deterministic: bool = True
    """Deterministic kernels where there is a choice (always so on CPU)."""

    @property
    def computes_in_bfloat16(self) -> bool:
        """Whether forward passes run under autocast and frozen weights are held rounded."""
        return self.dtype != "float32"

    @property
    def trains_in_bfloat16(self) -> bool:
        """Whether trained matrices, their gradients and Adam's state are held in bfloat16."""
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


class DivergenceConfig(FrozenConfig):
    """What happens to a stage whose loss explodes. Changes no weight of a stage that does not."""

    on_divergence: Literal["fail", "lower_lr"] = "fail"
    """'fail' ends the run there; 'lower_lr' trains the stage again from its parent at a lower learning rate."""

    factor: float = Field(0.5, gt=0, lt=1)
    """Each further attempt of the stage runs at this share of the last one's rate; later stages at the profile's."""

    max_retries: int = Field(2, ge=1, le=20)
    """Attempts at a lower rate, after which the run fails."""


class LoggingConfig(FrozenConfig):
    """What a stage reports while it runs. Changes no weight."""

    every_steps: int = Field(10, ge=1)
    """Steps between two metric records."""


class SnapshotConfig(FrozenConfig):
    """How often a stage's state is saved while it runs, so that a killed stage repeats little. Changes no weight."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between two snapshots; not counted in steps when absent."""

    every_seconds: float | None = Field(300.0, gt=0)
    """Seconds between two snapshots; 1e9 leaves only the one at a stop."""

    keep: int = Field(2, ge=1)
    """Snapshots kept in the store, and on this machine while the store is away, until their stage is committed."""


class LaunchConfig(FrozenConfig):
    """How the trainer process is started. Changes no weight beyond float rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto' takes a GPU where there is one."""

    nproc_per_node: Annotated[int, Field(ge=1)] | Literal["gpu"] = 1
    """Ranks on a machine, by torch's elastic launcher; 'gpu' takes as many as there are GPUs when a stage starts."""

    nnodes: int = Field(1, ge=1)
    """Machines; all but the flow's run `relora join` and see its cache and dataset under the same paths."""

    rdzv_endpoint: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+:\d{1,5}$")
    """'host:port' at which the flow's machine is found by the others; needed with several."""

    sharding: Literal["none", "full"] = "none"
    """'full' spreads weights, gradients and optimizer over the ranks (FSDP2): for a model too large for one device."""

    threads: int | None = Field(None, ge=1)
    """CPU threads of a rank; torch's choice when absent."""

    compile: bool = False
    """torch.compile for training, about a minute a stage; meant for GPUs, slower on the CPU we measured."""

    gradient_checkpointing: bool = False
    """Keep one activation a block and compute the rest again: far less memory, about a third more FLOPs."""

    @model_validator(mode="after")
    def a_sharded_model_is_not_compiled(self) -> Self:
        if self.compile and self.sharding == "full":
            raise ValueError("compile does not go with sharding 'full'; set one of them back")
        return self

    @model_validator(mode="after")
    def gpus_are_counted_only_where_they_are_used(self) -> Self:
        if self.nproc_per_node == "gpu" and self.device == "cpu":
            raise ValueError("nproc_per_node 'gpu' needs device 'cuda' or 'auto'")
        return self

    @model_validator(mode="after")
    def several_machines_have_a_place_to_meet(self) -> Self:
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ValueError(f"nnodes {self.nnodes} needs rdzv_endpoint, 'host:port' of the flow's machine")
        return self

    @property
    def world_size(self) -> int | None:
        """Ranks of a stage; None when only its start tells."""
        return None if self.nproc_per_node == "gpu" else self.nproc_per_node * self.nnodes


class RetentionConfig(FrozenConfig):
    """What `relora prune` and the flow `prune` keep of a run; with neither key nothing is pruned. Changes no weight."""

    keep_last: int | None = Field(None, ge=1)
    """Of every line of checkpoints, keep the last so many."""

    keep_every: int | None = Field(None, ge=1)
    """Also keep every so many-th cycle, the warm start included."""


class Profile(FrozenConfig):
    """All settings of a run."""

    name: str = "profile"
    """Name of the profile, for people; not part of any fingerprint."""

    method: Method = "relora"
    """'relora': warm start, then merged cycles; 'lora': one update merged at the end; 'full': full rank throughout."""

    objective: ObjectiveName = DEFAULT_OBJECTIVE
    """What is learned: 'causal_lm', the next token of text; 'image_classification', the class of an image."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of weights, data order, dropout and re-initialisation."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    images: ImagesConfig = ImagesConfig()
    batch: BatchConfig = BatchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    relora: ReLoRAConfig = ReLoRAConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    optimizer_reset: OptimizerResetConfig = OptimizerResetConfig()
    precision: PrecisionConfig = PrecisionConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    snapshots: SnapshotConfig = SnapshotConfig()
    launch: LaunchConfig = LaunchConfig()
    retention: RetentionConfig = RetentionConfig()

    @model_validator(mode="after")
    def source_belongs_to_the_objective(self) -> Self:
        sources = OBJECTIVES[self.objective].sources
        if self.data.source not in sources:
            raise ValueError(
                f"objective {self.objective!r} does not learn from data.source {self.data.source!r}; it takes "
                f"{', '.join(sources)}"
            )
        return self

    @model_validator(mode="after")
    def sections_fit_the_objective(self) -> Self:
        if fault := facts_of(self).fault():
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def sequence_fits_the_model(self) -> Self:
        if self.model.pretrained is None and self.batch.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"batch.sequence_length {self.batch.sequence_length} is longer than "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        return self

    @model_validator(mode="after")
    def rank_is_low(self) -> Self:
        width = min(self.model.hidden_size, self.model.intermediate_size)
        if self.relora.target_modules is None:
            width = min(width, self.model.key_value_size)
        if self.model.pretrained is None and self.method != "full" and self.relora.rank > width:
            raise ValueError(f"relora.rank {self.relora.rank} exceeds {width}, the smallest side of a wrapped layer")
        return self

    @model_validator(mode="after")
    def ranks_by_layer_have_a_warm_start_and_whole_weights(self) -> Self:
        if self.relora.rank_allocation == "uniform" or self.method == "full":
            return self
        if self.schedule.warm_start_steps == 0:
            raise ValueError("relora.rank_allocation 'warm-start-spectrum' needs schedule.warm_start_steps above 0")
        if self.launch.sharding == "full":
            raise ValueError(
                "relora.rank_allocation 'warm-start-spectrum' looks at whole weights, which launch.sharding 'full' "
                "never has; set one of them back"
            )
        return self

    @model_validator(mode="after")
    def ranks_share_the_batch(self) -> Self:
        if self.launch.world_size is not None and (fault := self.fault_of_ranks(self.launch.world_size)):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def embedding_holds_the_tokenizer(self) -> Self:
        rows, entries = self.model.vocab_size, self.tokenizer.vocab_size
        if self.model.pretrained is None and self.tokenizer.path is None and rows is not None and rows < entries:
            raise ValueError(f"model.vocab_size {rows} is below tokenizer.vocab_size {entries}")
        return self

    @model_validator(mode="after")
    def a_sharded_model_has_one_dtype(self) -> Self:
        if self.precision.trains_in_bfloat16 and self.launch.sharding == "full":
            raise ValueError(
                "precision.dtype 'pure-bfloat16' does not go with launch.sharding 'full': FSDP shards tensors of one "
                "dtype only; set precision.dtype to 'bfloat16'"
            )
        return self

    def fault_of_ranks(self, world_size: int) -> str | None:
        """Why a batch cannot be shared by so many ranks, or None: then their shares differ by one sequence at most."""
        if world_size > self.batch.sequences:
            return (
                f"batch.sequences {self.batch.sequences} leaves some of {world_size} ranks without a sequence: "
                f"launch at most {self.batch.sequences}"
            )
        if self.launch.sharding == "full" and self.batch.sequences % world_size:
            fitting = [n for n in range(1, self.batch.sequences + 1) if self.batch.sequences % n == 0]
            return (
                f"launch.sharding 'full' needs equal shares, and batch.sequences {self.batch.sequences} is no multiple "
                f"of {world_size} ranks: launch one of {', '.join(map(str, fitting))}"
            )
        return None

    @property
    def warm_start_learning_rate(self) -> float:
        """Peak learning rate of the warm start."""
        chosen = self.optimizer.warm_start_learning_rate
        return chosen if chosen is not None else self.optimizer.learning_rate / 2


def settings_digest(settings: dict[str, Any]) -> str:
    """SHA-256 in hex of settings as canonical JSON: the same for the same values in any order."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


LATER_KEYS = {
    "schedule": ("jagged", "cycle_growth"),
    "relora": ("rank_allocation", "init", "merge_dtype"),
    "optimizer": ("low_rank_lr_ratio", "low_rank_b_lr_ratio"),
}
"""Keys that came later, by section: at their defaults in no name and no fingerprint, so that older runs keep theirs."""


def unset_later_keys(profile: Profile, section: str) -> set[str]:
    """Those of LATER_KEYS in a section that are at their defaults."""
    settings = getattr(profile, section)
    fields = type(settings).model_fields
    return {key for key in LATER_KEYS[section] if getattr(settings, key) == fields[key].default}


def default_run_id(profile: Profile) -> str:
    """'<profile>-<8 hex>': the same settings meet their own run again, other settings make another run.

    Settings that can change no weight (how fast, where, what is reported) make no other run.
    """
    whole_sections = dict.fromkeys(
        ("name", "divergence", "evaluation", "logging", "snapshots", "launch", "retention"), True
    )
    harmless: dict[str, Any] = {**whole_sections, "data": {"name", "workers", "engine"}}
    harmless |= {section: unset_later_keys(profile, section) for section in LATER_KEYS}
    harmless |= dict.fromkeys(foreign_keys(profile.objective), True)
    settings = profile.model_dump(mode="json", exclude=harmless)
    name = re.sub(r"[^a-z0-9._-]+", "-", profile.name.lower()).strip("-.") or "run"
    return f"{name}-{settings_digest(settings)[:8]}"


def profile_from_file(path: Path) -> Profile:
    """The resolved settings saved beside a checkpoint."""
    return Profile.model_validate_json(path.read_bytes())
