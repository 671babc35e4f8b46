"""Train one stage: from one committed checkpoint to the next."""

from __future__ import annotations

from prefect import task
from prefect.logging import get_run_logger

from relora_train import events
from relora_train.checkpoint_store import CheckpointRef
from relora_train.divergence import train_by_policy
from relora_train.objectives.registry import headline_score
from relora_train.run import DatasetRef, Run, StageOutcome
from relora_train.stages import Stage
from tasks.artifacts import StageArtifacts
from tasks.observe import forward_events, provenance, skipped
from tasks.policies import TRAINING


@task(**TRAINING, name="warm-start", task_run_name="{stage.name} steps {stage.first_step}-{stage.end_step}")
def warm_start(run: Run, stage: Stage, dataset: DatasetRef, parent: CheckpointRef | None) -> StageOutcome:
    """Train the full-rank stage and return its StageOutcome; one that is committed already is shown as Skipped."""
    return _train(run, stage, dataset, parent)


@task(**TRAINING, name="train-cycle", task_run_name="{stage.name} steps {stage.first_step}-{stage.end_step}")
def train_cycle(run: Run, stage: Stage, dataset: DatasetRef, parent: CheckpointRef | None) -> StageOutcome:
    """Train one low-rank cycle, merge it and return its StageOutcome; a committed one is shown as Skipped."""
    return _train(run, stage, dataset, parent)


def _train(run: Run, stage: Stage, dataset: DatasetRef, parent: CheckpointRef | None) -> StageOutcome:
    with StageArtifacts(run.run_id, stage) as shown:
        on_event = shown.watch(forward_events())
        outcome = train_by_policy(run, stage, dataset, parent, on_event=on_event, provenance=provenance())
        shown.finished(outcome)
    manifest = outcome.checkpoint.manifest
    get_run_logger().info("checkpoint of %s: %s", stage.name, outcome.checkpoint.uri)
    events.emit(
        "stage_skipped" if outcome.reused else "stage_finished",
        stage=stage.name,
        step=stage.end_step,
        uri=outcome.checkpoint.uri,
        seconds=manifest.stage_seconds,
        **headline_score(manifest.evaluation),
    )
    return skipped(outcome, outcome.checkpoint.uri) if outcome.reused else outcome
