"""Train a stage again at a lower learning rate when it diverges, as the profile's [divergence] asks.

Attempt k of a stage is the stage with its learning rate times factor^k, from the same parent. Its settings are others,
so it has another fingerprint and a checkpoint of its own. The manifest names the stage that it replaces (variant_of)
and the reason (divergence), so a rerun finds it whatever the policy is by then. Later stages go on from it at the
profile's own rate: a stage is a function of its parent and the settings, and of nothing before.

The store also keeps the fact that an attempt diverged: neither a crash nor another machine makes it a second time.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from relora_train.checkpoints.layout import diverged_key
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.errors import DivergedError
from relora_train.method.stages import Stage
from relora_train.runs.find import find_stage, stage_identity
from relora_train.runs.run import DatasetRef, OnEvent, Run, StageOutcome
from relora_train.runs.train import train_stage
from relora_train.settings.profile import Profile
from relora_train.storage.base import find_json, put_json


def train_by_policy(
    run: Run,
    stage: Stage,
    dataset: DatasetRef,
    parent: CheckpointRef | None,
    *,
    on_event: OnEvent,
    provenance: Mapping[str, str],
) -> StageOutcome:
    """Train a stage as train_stage does and, if it diverges, do what the profile's [divergence] says.

    Raises DivergedError at once under 'fail'; under 'lower_lr' when max_retries attempts at lower rates diverged too.
    An attempt that is known to have diverged is not made again. Safe to repeat.
    """
    policy, dataset_id, failures = run.profile.divergence, dataset.dataset_id, list[dict[str, Any]]()
    own = stage_identity(run, stage, dataset_id, parent)
    train = partial(train_stage, stage=stage, dataset=dataset, parent=parent, on_event=on_event, provenance=provenance)
    if policy.on_divergence == "fail" or find_stage(run, stage, parent, own) is not None:
        return train(run, identity=own)
    rate = peak_learning_rate(run.profile, stage)
    for attempt in range(policy.max_retries + 1):
        lowered = replace(run, profile=lower_learning_rate(run.profile, stage, attempt))
        lowered_rate = peak_learning_rate(lowered.profile, stage)
        identity = stage_identity(lowered, stage, dataset_id, parent, at_own_rate=own)
        key = diverged_key(run.run_id, identity.fingerprint)
        failure = None if run.is_unstored(parent) else find_json(run.store, key)
        if failure is None or not {"learning_rate", "message"} <= failure.keys():  # a damaged record costs one attempt
            variant: dict[str, Any] = {}
            if attempt:
                divergence = {
                    "attempts": attempt,
                    "learning_rate": lowered_rate,
                    "learning_rate_factor": lowered_rate / rate,
                    "profile_learning_rate": rate,
                    "failures": [failure["message"] for failure in failures],
                }
                variant = {"variant_of": own.fingerprint, "divergence": divergence}
            try:
                return train(lowered, identity=identity, **variant)
            except DivergedError as error:
                failure = {"stage": stage.name, "learning_rate": lowered_rate, "message": str(error)}
                if parent is not None:
                    run.publisher.wait(parent)  # or it would be held against another result of the parent
                put_json(run.store, key, failure)
                on_event({"event": "diverged", **failure, "attempt": attempt + 1, "attempts": policy.max_retries + 1})
        failures.append(failure)
    rates = ", ".join(f"{failure['learning_rate']:.3g}" for failure in failures)
    raise DivergedError(
        f"Stage {stage.name} of run {run.run_id!r} diverged at every learning rate tried ({rates}); nothing of it was "
        "committed. Raise divergence.max_retries or lower divergence.factor and run again, or branch from an earlier "
        f"checkpoint with other settings. To try the same rates once more, delete "
        f"{run.store.uri}/{diverged_key(run.run_id, '')[: -len('.json')]}.\n  First failure: {failures[0]['message']}"
    )


def lower_learning_rate(profile: Profile, stage: Stage, attempt: int) -> Profile:
    """Return the profile of attempt k of a stage, from 0: its peak learning rate times factor^k, nothing else."""
    if attempt == 0:
        return profile
    optimizer = profile.optimizer.model_copy(update={"warm_start_learning_rate": profile.warm_start_learning_rate})
    key = "warm_start_learning_rate" if stage.kind == "warm_start" else "learning_rate"
    rate = peak_learning_rate(profile, stage) * profile.divergence.factor**attempt
    return profile.model_copy(update={"optimizer": optimizer.model_copy(update={key: rate})})


def divergence_text(record: Mapping[str, Any]) -> str:
    """Say a manifest's `divergence`: 'diverged once at learning rate 0.001, trained at 0.0005 (x 0.5)'."""
    attempts = int(record["attempts"])
    times = "once" if attempts == 1 else f"{attempts} times, first"
    return (
        f"diverged {times} at learning rate {record['profile_learning_rate']:.3g}, trained at "
        f"{record['learning_rate']:.3g} (x {record['learning_rate_factor']:.3g})"
    )


def peak_learning_rate(profile: Profile, stage: Stage) -> float:
    """Return the peak learning rate of the stage's phase."""
    return profile.warm_start_learning_rate if stage.kind == "warm_start" else profile.optimizer.learning_rate
