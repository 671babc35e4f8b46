"""The stages of a run and the fingerprint of each. Light: imports no torch, boto3 or prefect.

A stage is a function from one checkpoint to the next. Its fingerprint is a hash of every setting that can change its
result and of its parent's fingerprint, so a checkpoint with that fingerprint is that stage's result, whoever made it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

from relora_train.config import Profile, settings_digest
from relora_train.errors import ConfigError
from relora_train.schedule import learning_rate

StageKind = Literal["full", "warm_start", "relora", "lora"]


@dataclass(frozen=True)
class Stage:
    """Updates start_step + 1 … end_step of a run."""

    name: str
    """'warm-start', 'cycle-2', 'lora' or 'full-3': part of names, URIs and logs."""

    kind: StageKind
    start_step: int
    end_step: int
    cycle: int
    """Merges done when the stage has ended; 0 for full-rank stages."""

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step

    @property
    def low_rank(self) -> bool:
        """Whether A and B are trained and merged at the end."""
        return self.kind in ("relora", "lora")


def plan_stages(profile: Profile) -> tuple[Stage, ...]:
    """The stages of a run from its first step, in order.

    relora: warm start, then one stage a cycle. lora: warm start, then one low-rank stage merged at its end.
    full: full rank throughout, with a checkpoint wherever relora would have one.
    """
    schedule = profile.schedule
    warm, length = schedule.warm_start_steps, schedule.cycle_length
    ends = [warm + cycle * length for cycle in range(1, schedule.cycles + 1)]
    if profile.method == "full":
        bounds = [0, *([warm] if warm else []), *ends]
        pairs = enumerate(itertools.pairwise(bounds), start=1)
        return tuple(Stage(f"full-{i}", "full", start, end, 0) for i, (start, end) in pairs)
    first = (Stage("warm-start", "warm_start", 0, warm, 0),) if warm else ()
    if profile.method == "lora":
        return (*first, Stage("lora", "lora", warm, schedule.total_steps, 1))
    cycles = (Stage(f"cycle-{k}", "relora", end - length, end, k) for k, end in enumerate(ends, start=1))
    return (*first, *cycles)


def stages_after(profile: Profile, step: int) -> tuple[Stage, ...]:
    """The stages that remain after a checkpoint at `step`; ConfigError when it lies inside a stage."""
    stages = plan_stages(profile)
    bounds = [0, *(stage.end_step for stage in stages)]
    if step not in bounds:
        raise ConfigError(
            f"The checkpoint is at step {step}, but the stages of profile {profile.name!r} end at "
            f"{', '.join(map(str, bounds[1:]))}. Choose a checkpoint at one of these, or set "
            "schedule.warm_start_steps and schedule.cycle_length so that a stage ends there."
        )
    return tuple(stage for stage in stages if stage.start_step >= step)


def stage_learning_rate(profile: Profile, stage: Stage, step: int) -> float:
    """Learning rate of update `step`, counted from 1, as a function of the profile and the step alone.

    'full' is one cosine over the whole run. 'lora' has the ReLoRA phase as a single cycle, so it never restarts.
    """
    schedule = profile.schedule
    one_phase = stage.kind == "full"
    phase_steps = schedule.total_steps - schedule.warm_start_steps
    return learning_rate(
        step - 1,
        warm_start_steps=0 if one_phase else schedule.warm_start_steps,
        total_steps=schedule.total_steps,
        warmup_steps=schedule.warmup_steps,
        restart_warmup_steps=schedule.restart_warmup_steps,
        cycle_length={"full": schedule.total_steps, "lora": phase_steps}.get(stage.kind, schedule.cycle_length),
        min_lr_ratio=schedule.min_lr_ratio,
        warm_start_learning_rate=profile.warm_start_learning_rate,
        learning_rate=profile.optimizer.learning_rate,
    )


def fingerprint_settings(
    profile: Profile, stage: Stage, dataset_id: str, *, pretrained_content: str | None = None
) -> dict[str, Any]:
    """Every setting that can change what the stage computes, as flat dotted keys with JSON values.

    Left out because they cannot: names, paths, logging, evaluation, number of ranks (data order and re-initialisation
    do not depend on it; sums may round differently), and whatever belongs to later stages or other methods only.
    pretrained_content: digest of the files of model.pretrained, when the stage starts from them.
    """
    optimizer = profile.optimizer.model_dump(mode="json", exclude={"learning_rate", "warm_start_learning_rate"})
    settings: dict[str, Any] = {
        "stage": {"kind": stage.kind, "start_step": stage.start_step, "end_step": stage.end_step},
        "dataset_id": dataset_id,
        "seed": profile.seed,
        "model": profile.model.model_dump(mode="json"),
        "batch": profile.batch.model_dump(mode="json"),
        "precision": profile.precision.model_dump(mode="json"),
        "optimizer": optimizer,
        "schedule": {
            "total_steps": profile.schedule.total_steps,
            "warmup_steps": profile.schedule.warmup_steps,
            "min_lr_ratio": profile.schedule.min_lr_ratio,
        },
    }
    if pretrained_content is not None:
        settings["model"]["pretrained_content"] = pretrained_content
    if stage.kind == "warm_start":
        optimizer["warm_start_learning_rate"] = profile.warm_start_learning_rate
    else:
        optimizer["learning_rate"] = profile.optimizer.learning_rate
    if stage.low_rank:
        settings["schedule"]["warm_start_steps"] = profile.schedule.warm_start_steps
        settings["relora"] = profile.relora.model_dump(mode="json")
    if stage.kind == "relora":
        settings["schedule"]["cycle_length"] = profile.schedule.cycle_length
        if stage.cycle > 1:  # the first cycle climbs by warmup_steps
            settings["schedule"]["restart_warmup_steps"] = profile.schedule.restart_warmup_steps
        settings["optimizer_reset"] = profile.optimizer_reset.model_dump(mode="json")
    return _flatten(settings)


def stage_fingerprint(settings: dict[str, Any], parent_fingerprint: str | None) -> str:
    """SHA-256 in hex over a stage's settings and its parent's fingerprint."""
    return settings_digest({"settings": settings, "parent": parent_fingerprint})


def differing_settings(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Lines 'key: theirs -> ours' for every setting that differs, sorted by key."""
    keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    return [f"{key}: {theirs.get(key, 'absent')} -> {ours.get(key, 'absent')}" for key in keys]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
