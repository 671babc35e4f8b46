"""Train a stage again at a lower learning rate when it diverges, as the profile's [divergence] asks.

Attempt k of a stage is the stage with its learning rate times factor^k, from the same parent. Its settings are others,
so it has another fingerprint and a checkpoint of its own. The manifest names the stage that it replaces (variant_of)
and the reason (divergence), so a rerun finds it whatever the policy is by then. Later stages go on from it at the
profile's own rate: a stage is a function of its parent and the settings, and of nothing before.

The store also keeps the fact that an attempt diverged: neither a crash nor another machine makes it a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relora_train.checkpoints.layout import diverged_key
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.errors import DivergedError
from relora_train.method.stages import Stage
from relora_train.runs.find import find_stage, stage_identity
from relora_train.runs.run import DatasetRef, OnEvent, Run, StageOutcome
from relora_train.runs.train import train_stage
from relora_train.settings.profile import Profile
from relora_train.storage.base import ObjectStore, find_json, put_json


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
    policy = run.profile.divergence
    if policy.on_divergence == "fail" or find_stage(run, stage, dataset.dataset_id, parent) is not None:
        return train_stage(run, stage, dataset, parent, on_event=on_event, provenance=provenance)
    own = stage_identity(run, stage, dataset.dataset_id, parent)[1]
    failures: list[dict[str, Any]] = []
    for attempt in range(policy.max_retries + 1):
        lowered = replace(run, profile=lower_learning_rate(run.profile, stage, attempt))
        key = diverged_key(run.run_id, stage_identity(lowered, stage, dataset.dataset_id, parent)[1])
        failure = None if run.is_unstored(parent) else _known_failure(run.store, key)
        if failure is None:
            variant: dict[str, Any] = {}
            if attempt:
                variant = {"variant_of": own, "divergence": _divergence(run.profile, lowered.profile, stage, failures)}
            try:
                return train_stage(lowered, stage, dataset, parent, on_event=on_event, provenance=provenance, **variant)
            except DivergedError as error:
                failure = _failure(stage, lowered.profile, error)
                if parent is not None:
                    run.wait_until_stored(parent)  # or it would be held against another result of the parent
                put_json(run.store, key, failure)
                on_event({"event": "diverged", **failure, "attempt": attempt + 1, "attempts": policy.max_retries + 1})
        failures.append(failure)
    raise _exhausted(run, stage, failures)


def lower_learning_rate(profile: Profile, stage: Stage, attempt: int) -> Profile:
    """Return the profile of attempt k of a stage, from 0: its peak learning rate times factor^k, nothing else."""
    rates = {
        "learning_rate": profile.optimizer.learning_rate,
        "warm_start_learning_rate": profile.warm_start_learning_rate,
    }
    if attempt == 0:
        return profile
    rates["warm_start_learning_rate" if stage.kind == "warm_start" else "learning_rate"] *= (
        profile.divergence.factor**attempt
    )
    return profile.model_copy(update={"optimizer": profile.optimizer.model_copy(update=rates)})


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


def _divergence(profile: Profile, lowered: Profile, stage: Stage, failures: list[dict[str, Any]]) -> dict[str, Any]:
    own, used = peak_learning_rate(profile, stage), peak_learning_rate(lowered, stage)
    return {
        "attempts": len(failures),
        "learning_rate": used,
        "learning_rate_factor": used / own,
        "profile_learning_rate": own,
        "failures": [failure["message"] for failure in failures],
    }


def _failure(stage: Stage, profile: Profile, error: DivergedError) -> dict[str, Any]:
    return {"stage": stage.name, "learning_rate": peak_learning_rate(profile, stage), "message": str(error)}


def _known_failure(store: ObjectStore, key: str) -> dict[str, Any] | None:
    """Return what an earlier attempt left. A damaged record counts as none and costs one attempt."""
    record = find_json(store, key) or {}
    return record if {"learning_rate", "message"} <= record.keys() else None


def _exhausted(run: Run, stage: Stage, failures: list[dict[str, Any]]) -> DivergedError:
    rates = ", ".join(f"{failure['learning_rate']:.3g}" for failure in failures)
    return DivergedError(
        f"Stage {stage.name} of run {run.run_id!r} diverged at every learning rate tried ({rates}); nothing of it was "
        "committed. Raise divergence.max_retries or lower divergence.factor and run again, or branch from an earlier "
        f"checkpoint with other settings. To try the same rates once more, delete "
        f"{run.store.uri}/{diverged_key(run.run_id, '')[: -len('.json')]}.\n  First failure: {failures[0]['message']}"
    )
