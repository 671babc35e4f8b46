"""The tasks of a run beside training: check its model, prepare its dataset, score checkpoints, write the report."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefect import task

from relora_train import events
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.method.stages import Stage
from relora_train.runs import evaluations as evaluation_records
from relora_train.runs import task_scores
from relora_train.runs.datasets import DatasetOutcome, prepare_or_reuse
from relora_train.runs.evaluations import EvaluationOutcome, evaluate_or_reuse
from relora_train.runs.model_check import check_run
from relora_train.runs.run import DatasetRef, Run
from relora_train.settings.objectives import SCORES
from relora_train.settings.tasks import TaskMeasure, TaskSelection
from tasks.artifacts import publish_markdown
from tasks.dask_ranges import ranges_on
from tasks.observe import forward_events, skipped
from tasks.policies import STORE_IO

if TYPE_CHECKING:
    from relora_train.reports.report import StoredReport

_REPORT = "relora_train.reports.report"


@task(**STORE_IO, name="check-model", task_run_name="check-model-of-{run.run_id}")
def check_model(run: Run, stages: Sequence[Stage], parent: CheckpointRef | None) -> None:
    """Refuse a run whose model, targets, ranks or devices would end one of its stages."""
    check_run(run, stages, parent, on_event=forward_events())


@task(**STORE_IO, task_run_name="tokenize-{run.profile.data.name}")
def tokenize(run: Run, parent: CheckpointRef | None) -> DatasetOutcome:
    """Return the DatasetOutcome of the profile's corpus; one that is committed already is shown as Skipped."""
    ranges = ranges_on(run.profile.data.dask)
    return tell_dataset(prepare_or_reuse(run, parent=parent, on_event=forward_events(), map_ranges=ranges))


def tell_dataset(outcome: DatasetOutcome) -> DatasetOutcome:
    """Say which dataset there is now; return it from a task, to show a reused one as Skipped."""
    manifest = outcome.dataset.manifest
    events.emit(
        "dataset_ready",
        uri=outcome.dataset.uri,
        name=manifest.name,
        reused=outcome.reused,
        train_tokens=manifest.train_tokens,
        val_tokens=manifest.val_tokens,
        unit=manifest.unit,
    )
    return skipped(outcome, outcome.dataset.uri) if outcome.reused else outcome


@task(**STORE_IO, name="evaluate-checkpoint", task_run_name="evaluate-{checkpoint.manifest.stage}")
def evaluate_checkpoint(run: Run, checkpoint: CheckpointRef, dataset: DatasetRef) -> EvaluationOutcome:
    """Return the EvaluationOutcome of a checkpoint; scores that are recorded already are shown as Skipped."""
    return _announced(evaluate_or_reuse(run, checkpoint, dataset, on_event=forward_events()), checkpoint)


@task(**STORE_IO, name="score-checkpoint", task_run_name="score-{checkpoint.manifest.stage}")
def score_checkpoint(checkpoint: CheckpointRef) -> EvaluationOutcome:
    """Evaluate a checkpoint of any run, with its own profile and on its own dataset."""
    return _announced(evaluation_records.score_checkpoint(checkpoint, on_event=forward_events()), checkpoint)


@task(**STORE_IO, name="score-by-tasks", task_run_name="tasks-of-{checkpoint.manifest.stage}")
def score_by_tasks(checkpoint: CheckpointRef, selection: TaskSelection) -> EvaluationOutcome:
    """Score a checkpoint of any run by tasks of lm-evaluation-harness; recorded scores are shown as Skipped."""
    outcome = task_scores.score_by_tasks(checkpoint, selection, on_event=forward_events())
    return skipped(outcome, "the scores") if outcome.reused else outcome


@task(**STORE_IO, name="measure", task_run_name="{measure.score}-of-{checkpoint.manifest.stage}")
def measure_by_task(checkpoint: CheckpointRef, measure: TaskMeasure) -> float:
    """Return a checkpoint's score by a task of lm-evaluation-harness; a recorded one is reused."""
    return task_scores.measured(checkpoint, measure, on_event=forward_events())


def _announced(outcome: EvaluationOutcome, checkpoint: CheckpointRef) -> EvaluationOutcome:
    scores = {key: value for key, value in outcome.record.items() if key in SCORES}
    told = {"samples": outcome.record.get("samples", []), **scores}
    events.emit("evaluated", uri=checkpoint.uri, stage=checkpoint.manifest.stage, reused=outcome.reused, **told)
    return skipped(outcome, "the scores") if outcome.reused else outcome


@task(**STORE_IO, task_run_name="report-{run.run_id}")
def write_report(run: Run, line: Sequence[CheckpointRef], evaluations: Sequence[dict[str, Any]]) -> StoredReport:
    """Write HTML, plots and summary to the store, and table and plot as an artifact; return the StoredReport."""
    report: StoredReport = import_module(_REPORT).report_run(line, evaluations, run.store, run.run_id)
    publish_markdown(f"report-{run.run_id}", report.markdown, f"Report of run {run.run_id}: {report.html_uri}")
    events.emit("report_written", html_uri=report.html_uri)
    return report


def load_report() -> None:
    """Import the report with its plots beside the training, which it would otherwise begin or end later by a second."""
    threading.Thread(target=import_module, args=(_REPORT,), name="load report", daemon=True).start()
