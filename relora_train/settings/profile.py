"""A run's settings together: frozen, bounded, explained where they are declared, which is settings/ for a section.

A profile is sparse TOML over these defaults; `--set section.key=value` goes over the profile. Unknown keys are
refused and all faults are shown at once.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from relora_train.settings.base import FrozenConfig
from relora_train.settings.data import BatchConfig, DataConfig, TokenizerConfig
from relora_train.settings.images import ImagesConfig
from relora_train.settings.keys import REMOVED_KEYS, removed, settings_digest
from relora_train.settings.method import (
    DivergenceConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerResetConfig,
    ReLoRAConfig,
    ScheduleConfig,
)
from relora_train.settings.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, ObjectiveName, foreign_keys
from relora_train.settings.running import (
    EvaluationConfig,
    LaunchConfig,
    LoggingConfig,
    PrecisionConfig,
    RetentionConfig,
    SnapshotConfig,
)
from relora_train.settings.tracking import TrackingConfig

_SUBSPACE = ("subspace_rank", "subspace_steps", "subspace_scale")


class Profile(FrozenConfig):
    """All settings of a run."""

    name: str = "profile"
    """Name of the profile, for people; not part of any fingerprint."""

    method: Literal["full", "lora", "relora"] = "relora"
    """'relora': warm start, then merged cycles; 'lora': one update merged at the end; 'full': full rank throughout."""

    objective: ObjectiveName = DEFAULT_OBJECTIVE
    """The thing learned: 'causal_lm', the next token of text; 'masked_lm', its hidden tokens;
    'sequence_classification', the class of a text; 'seq2seq', a text from a text; 'image_classification', the class of
    an image."""

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
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def removed_keys_are_refused(cls, given: Any, info: ValidationInfo) -> Any:
        """Drop removed keys at their defaults; others too where a stored profile is read and nothing trains by it.

        A stored profile without relora.train is of a version that trained everything beside the wrapped weights.
        """
        if not isinstance(given, Mapping):
            return given
        kept = dict(given)
        for section, defaults in REMOVED_KEYS.items():
            settings = given.get(section)
            if not isinstance(settings, Mapping):
                continue
            for key in [] if info.context else defaults.keys() & settings.keys():
                if settings[key] != defaults[key]:
                    raise ValueError(f"{section}.{key} = {settings[key]!r}: {removed(f'{section}.{key}')}")
            kept[section] = {key: value for key, value in settings.items() if key not in defaults}
        relora = kept.get("relora")
        if info.context and isinstance(relora, Mapping) and "train" not in relora:  # of a version that trained all
            kept["relora"] = {**relora, "train": {"others": True}}
        return kept

    @model_validator(mode="after")
    def settings_fit_the_objective(self) -> Self:
        sources = OBJECTIVES[self.objective].sources
        if self.data.source not in sources:
            raise ValueError(
                f"objective {self.objective!r} does not learn from data.source {self.data.source!r}; it takes "
                f"{', '.join(sources)}"
            )
        if self.objective == "causal_lm":
            return self
        if self.batch.documents != "join":
            raise ValueError(f"batch.documents is of objective 'causal_lm', not of {self.objective!r}; leave it out")
        if self.evaluation.sample_prompts:
            raise ValueError("evaluation.sample_prompts are continued by objective 'causal_lm' only; leave them out")
        if self.objective != "image_classification":
            return self
        images, length = self.images, self.batch.sequence_length
        if length != images.patches:
            raise ValueError(
                f"batch.sequence_length {length} is not {images.patches}, the patches of {images.patch_size} x "
                f"{images.patch_size} pixels in an image of {images.size} x {images.size}"
            )
        return self

    @model_validator(mode="after")
    def records_fit_the_objective(self) -> Self:
        held = {part.holds for part in self.data.parts()}
        names = {
            "texts": "whole texts",
            "messages": "data.instructions.messages",
            "prompts": "data.instructions.prompt",
            "labels": "data.labels",
        }
        learns_from = OBJECTIVES[self.objective].learns_from
        if foreign := sorted(held - {*learns_from}):
            raise ValueError(
                f"objective {self.objective!r} does not learn from {names[foreign[0]]}; it takes "
                f"{' or '.join(names[kind] for kind in learns_from)}"
            )
        if self.objective == "causal_lm" and held & {"messages", "prompts"} and self.batch.documents != "mask":
            raise ValueError(
                "data.instructions are packed, several into a sequence, and an answer must not depend on the ones "
                "before it: set batch.documents to 'mask'"
            )
        return self

    @model_validator(mode="after")
    def optimizer_fits_method_and_parameters(self) -> Self:
        optimizer, fields = self.optimizer, OptimizerConfig.model_fields
        if not optimizer.projects and (foreign := [k for k in _SUBSPACE if getattr(optimizer, k) != fields[k].default]):
            raise ValueError(
                f"optimizer.{foreign[0]} is of kinds 'galore' and 'fira', not of {optimizer.kind!r}; leave it out"
            )
        alone = self.launch.world_size == 1 and self.batch.forward_passes(1)[1] == 1
        if optimizer.in_backward and not (
            self.method == "full"
            and optimizer.max_grad_norm is None
            and alone
            and not self.precision.trains_in_bfloat16
        ):
            raise ValueError(
                "optimizer.in_backward moves each parameter once its gradient is made: set method to 'full', "
                "optimizer.max_grad_norm to 'off', launch for one rank, and leave out batch.micro_sequences and "
                "precision.dtype 'pure-bfloat16'"
            )
        if optimizer.state == "8bit" and optimizer.has_rules:
            raise ValueError(
                "optimizer.state '8bit' is of AdamW alone: leave it out, or optimizer.kind and optimizer.low_rank_state"
            )
        if optimizer.projects and self.method != "full":
            raise ValueError(
                f"optimizer.kind {optimizer.kind!r} is a rival of low-rank training, not a part of it: set method to "
                "'full', or optimizer.kind to 'adamw' or 'factored'"
            )
        if optimizer.has_rules and (self.launch.sharding == "full" or self.precision.trains_in_bfloat16):
            changed = "low_rank_state" if optimizer.kind == "adamw" else "kind"
            raise ValueError(
                f"optimizer.{changed} {getattr(optimizer, changed)!r} goes with whole float32 parameters: leave it "
                "out, or set launch.sharding to 'none' and precision.dtype to 'bfloat16' or 'float32'"
            )
        return self

    @model_validator(mode="after")
    def settings_fit_a_new_model(self) -> Self:
        model, length, rows = self.model, self.batch.sequence_length, self.model.vocab_size
        if model.pretrained is not None:
            return self
        if length > model.max_position_embeddings:
            raise ValueError(
                f"batch.sequence_length {length} is longer than model.max_position_embeddings "
                f"{model.max_position_embeddings}"
            )
        width = min(model.hidden_size, model.intermediate_size)
        if self.relora.target_modules is None:
            width = min(width, model.head_size * (model.num_key_value_heads or model.num_attention_heads))
        subspace = self.optimizer.subspace_rank
        if self.optimizer.projects and subspace > width:
            raise ValueError(f"optimizer.subspace_rank {subspace} exceeds {width}, the smallest side of a layer")
        if self.method != "full" and self.relora.rank > width:
            raise ValueError(f"relora.rank {self.relora.rank} exceeds {width}, the smallest side of a wrapped layer")
        if self.tokenizer.path is None and rows is not None and rows < self.tokenizer.vocab_size:
            raise ValueError(f"model.vocab_size {rows} is below tokenizer.vocab_size {self.tokenizer.vocab_size}")
        return self

    @model_validator(mode="after")
    def ranks_share_batch_and_model(self) -> Self:
        if self.launch.world_size is not None and (fault := self.fault_of_ranks(self.launch.world_size)):
            raise ValueError(fault)
        if self.precision.frozen in ("int8", "nf4") and self.launch.sharding == "full":
            raise ValueError(
                f"precision.frozen {self.precision.frozen!r} does not go with launch.sharding 'full', which shards "
                "tensors of one dtype only; leave precision.frozen out"
            )
        if self.optimizer.state == "8bit" and (self.launch.sharding == "full" or self.precision.trains_in_bfloat16):
            raise ValueError(
                "optimizer.state '8bit' goes with whole float32 parameters: leave it out, or set launch.sharding to "
                "'none' and precision.dtype to 'bfloat16' or 'float32'"
            )
        if self.precision.trains_in_bfloat16 and self.launch.sharding == "full":
            raise ValueError(
                "precision.dtype 'pure-bfloat16' does not go with launch.sharding 'full': FSDP shards tensors of one "
                "dtype only; set precision.dtype to 'bfloat16'"
            )
        return self

    def fault_of_ranks(self, world_size: int) -> str | None:
        """Return the reason why so many ranks cannot share a batch; None if shares differ by one sequence at most."""
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


LATER_KEYS = {
    "data": ("validation_paths", "unreadable", "sources", "instructions", "labels", "dask"),
    "batch": ("documents", "too_long", "target_length"),
    "precision": ("residual", "frozen"),
    "tokenizer": ("revision", "mask_token"),
    "schedule": ("jagged", "cycle_growth", "horizon"),
    "relora": ("dropout_mask", "train"),
    "optimizer": ("state", "kind", "low_rank_state", "in_backward", *_SUBSPACE),
    "optimizer_reset": ("restart_clock",),
}
"""Keys that came later, by section: at their defaults in no name and no fingerprint, so that older runs keep theirs."""


def unset_later_keys(profile: Profile, section: str) -> set[str]:
    """Return those of LATER_KEYS in a section that are at their defaults."""
    settings = getattr(profile, section)
    fields = type(settings).model_fields
    return {key for key in LATER_KEYS[section] if getattr(settings, key) == fields[key].default}


def default_run_id(profile: Profile) -> str:
    """'<profile>-<8 hex>': the same settings meet their own run again, other settings make another run.

    Settings that can change no weight (how fast, where, what is reported) make no other run.
    """
    harmless = ("name", "divergence", "evaluation", "logging", "snapshots", "launch", "retention", "tracking")
    unnamed: dict[str, Any] = {section: unset_later_keys(profile, section) for section in LATER_KEYS}
    if not profile.relora.frozen:  # as before there was a choice
        unnamed["relora"] |= {"train"}
    unnamed |= unnamed_data_keys(profile) | dict.fromkeys((*harmless, *foreign_keys(profile.objective)), True)
    settings = profile.model_dump(mode="json", exclude=unnamed)
    name = re.sub(r"[^a-z0-9._-]+", "-", profile.name.lower()).strip("-.") or "run"
    return f"{name}-{settings_digest(settings)[:8]}"


def unnamed_data_keys(profile: Profile) -> dict[str, set[str]]:
    """Keys of what is learned from that are no part of a run's name, by section.

    Two of them change the data: tokenizer.train and data.bos came later, and their defaults are not what runs before
    them did. Such a run is found by its old settings, so that it can say how to go on: runs/datasets.py.
    """
    bos = {"bos"} if profile.data.bos is not True else set()  # no run before it had one
    return {
        "data": {"name", "workers", "engine", "dask", "content_sha256"} | bos | unset_later_keys(profile, "data"),
        "tokenizer": {"train"} | unset_later_keys(profile, "tokenizer"),
    }


def profile_to_read(content: bytes) -> Profile:
    """Return the settings saved beside a checkpoint, less what was removed: to read by, not to train by."""
    return Profile.model_validate_json(content, context={"reading": True})
