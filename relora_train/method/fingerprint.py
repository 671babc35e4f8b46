"""The fingerprint of a stage: a hash of every setting that can change its result, and of its parent's fingerprint.

A checkpoint with that fingerprint is that stage's result, whoever made it.
"""

from __future__ import annotations

from typing import Any

from relora_train.method.stages import Stage
from relora_train.settings.keys import flatten, settings_digest
from relora_train.settings.objectives import own_settings
from relora_train.settings.profile import Profile, unset_later_keys


def fingerprint_settings(
    profile: Profile, stage: Stage, dataset_id: str, *, pretrained_content: str | None = None
) -> dict[str, Any]:
    """Return every setting that can change what the stage computes, as flat dotted keys with JSON values.

    Left out because they cannot: names, paths, logging, evaluation, number of ranks (data order and re-initialisation
    do not depend on it; sums may round differently), and whatever belongs to later stages or other methods only.
    A low-rank stage's schedule.warm_start_steps and total_steps say where its phase began and will end, in its own
    steps. On a branch these can differ from the profile's: one curve has one fingerprint.
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
            "total_steps": profile.schedule.warm_start_steps + profile.schedule.horizon_steps,
            "warmup_steps": profile.schedule.warmup_steps,
            "min_lr_ratio": profile.schedule.min_lr_ratio,
        },
    }
    settings |= own_settings(profile)
    if pretrained_content is not None:
        settings["model"]["pretrained_content"] = pretrained_content
    if stage.kind == "warm_start":
        optimizer["warm_start_learning_rate"] = profile.warm_start_learning_rate
    else:
        optimizer["learning_rate"] = profile.optimizer.learning_rate
    if stage.low_rank:
        phase_start = stage.start_step - stage.phase_step
        settings["schedule"]["warm_start_steps"] = phase_start
        settings["schedule"]["total_steps"] = phase_start + profile.schedule.horizon_steps
        settings["relora"] = profile.relora.model_dump(mode="json")
    if stage.kind == "relora":
        settings["schedule"]["cycle_length"] = profile.schedule.cycle_length
        if profile.schedule.cycle_growth != 1:
            settings["schedule"]["cycle_growth"] = profile.schedule.cycle_growth
        if stage.cycle > 1:  # the first cycle climbs by warmup_steps
            settings["schedule"]["restart_warmup_steps"] = profile.schedule.restart_warmup_steps
            if not profile.schedule.jagged:  # absent otherwise: checkpoints from before the key keep their fingerprint
                settings["schedule"]["jagged"] = False
        unset = unset_later_keys(profile, "optimizer_reset")
        settings["optimizer_reset"] = profile.optimizer_reset.model_dump(mode="json", exclude=unset)
    return flatten(settings)


def stage_fingerprint(settings: dict[str, Any], parent_fingerprint: str | None) -> str:
    """SHA-256 in hex over a stage's settings and its parent's fingerprint."""
    return settings_digest({"settings": settings, "parent": parent_fingerprint})
