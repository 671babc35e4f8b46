"""Train one stage: from one committed checkpoint to the next."""

from __future__ import annotations

from prefect import task
from prefect.logging import get_run_logger

from relora_train import events
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.method.stages import Stage
from relora_train.runs.divergence import train_by_policy
from relora_train.runs.run import DatasetRef, Run, StageOutcome
from relora_train.runs.train import store_trained
from relora_train.settings.objectives import measures_in
from relora_train.storage.workspace import cache_root
from tasks.artifacts import StageArtifacts, show_checkpoint
from tasks.observe import forward_events, provenance, skipped, tell_low_disk
from tasks.policies import STORE_IO, TRAINING


@task(**TRAINING, name="warm-start", task_run_name="{stage.name} steps {stage.first_step}-{stage.end_step}")
def warm_start(run: Run, stage: Stage, dataset: DatasetRef, parent: CheckpointRef | None) -> StageOutcome:
    """Train the full-rank stage and return its StageOutcome; one that is committed already is shown as Skipped.

    Completed means trained and stored; for a remote store trained and durable on this machine: store_checkpoint
    follows.
    """
    return _train(run, stage, dataset, parent)


@task(**TRAINING, name="train-cycle", task_run_name="{stage.name} steps {stage.first_step}-{stage.end_step}")
def train_cycle(run: Run, stage: Stage, dataset: DatasetRef, parent: CheckpointRef | None) -> StageOutcome:
    """Train one low-rank cycle, merge it and return its StageOutcome; else as warm_start."""
    return _train(run, stage, dataset, parent)


@task(**STORE_IO, name="store-checkpoint", task_run_name="store {outcome.checkpoint.manifest.stage}")
def store_checkpoint(run: Run, outcome: StageOutcome) -> StageOutcome:
    """Return the StageOutcome of a trained stage once its checkpoint is stored; Completed means committed, head moved.

    Waits for the run's publisher, which has been at it since the stage was trained. To be called when nothing reads the
    checkpoint's local files any more: after the next stage.
    """
    stored = store_trained(run, outcome)
    show_checkpoint(run.run_id, stored.checkpoint)
    get_run_logger().info("checkpoint of %s: %s", stored.checkpoint.manifest.stage, stored.checkpoint.uri)
    return stored


def _train(run: Run, stage: Stage, dataset: DatasetRef, parent: CheckpointRef | None) -> StageOutcome:
    with StageArtifacts(run.run_id, stage) as shown:
        on_event = shown.watch(forward_events())
        outcome = train_by_policy(run, stage, dataset, parent, on_event=on_event, provenance=provenance())
        shown.finished(outcome)
    manifest, uri = outcome.checkpoint.manifest, outcome.checkpoint.uri
    if not outcome.reused:
        local = run.store.local_path(outcome.checkpoint.prefix)
        tell_low_disk(run.run_id, [cache_root(), *([local] if local else [])], manifest.size_bytes)
    headline = measures_in(manifest.evaluation).headline.key
    get_run_logger().info("checkpoint of %s%s: %s", stage.name, "" if outcome.stored else ", being stored", uri)
    events.emit(
        "stage_skipped" if outcome.reused else "stage_finished",
        stage=stage.name,
        step=stage.end_step,
        uri=uri if outcome.stored else None,
        seconds=manifest.stage_seconds,
        **{headline: manifest.evaluation.get(headline)},
    )
    return skipped(outcome, uri) if outcome.reused else outcome
