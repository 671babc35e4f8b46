"""Score one committed checkpoint."""

from __future__ import annotations

from prefect import task

from relora_train import events
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.runs import evaluations as evaluation_records
from relora_train.runs.evaluations import EvaluationOutcome, evaluate_or_reuse
from relora_train.runs.run import DatasetRef, Run
from relora_train.settings.objectives import SCORES
from tasks.observe import forward_events, skipped
from tasks.policies import STORE_IO


@task(**STORE_IO, name="evaluate-checkpoint", task_run_name="evaluate-{checkpoint.manifest.stage}")
def evaluate_checkpoint(run: Run, checkpoint: CheckpointRef, dataset: DatasetRef) -> EvaluationOutcome:
    """Return the EvaluationOutcome of a checkpoint; scores that are recorded already are shown as Skipped."""
    outcome = evaluate_or_reuse(
        run.profile, checkpoint, dataset, run.store, on_event=forward_events(), worker=run.worker
    )
    return _announced(outcome, checkpoint)


@task(**STORE_IO, name="score-checkpoint", task_run_name="score-{checkpoint.manifest.stage}")
def score_checkpoint(checkpoint: CheckpointRef) -> EvaluationOutcome:
    """Evaluate a checkpoint of any run, with its own profile and on its own dataset."""
    return _announced(evaluation_records.score_checkpoint(checkpoint, on_event=forward_events()), checkpoint)


def _announced(outcome: EvaluationOutcome, checkpoint: CheckpointRef) -> EvaluationOutcome:
    scores = {key: value for key, value in outcome.record.items() if key in SCORES}
    events.emit("evaluated", uri=checkpoint.uri, stage=checkpoint.manifest.stage, reused=outcome.reused, **scores)
    return skipped(outcome, "the scores") if outcome.reused else outcome
