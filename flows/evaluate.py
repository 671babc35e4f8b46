"""Evaluate any checkpoint on demand: perplexity on its validation split, and samples."""

from __future__ import annotations

from prefect import flow

from flows.parameters import CheckpointName, Documents, LimitName, StoreUri, TaskDirectory, TaskNames
from relora_train.runs.evaluations import EvaluationOutcome
from relora_train.runs.task_scores import check_tasks
from relora_train.settings.tasks import TaskSelection
from tasks.limits import device_slot, require_limit
from tasks.observe import done
from tasks.run import score_by_tasks, score_checkpoint
from tasks.store import open_run_store, resolve_parent


@flow(name="evaluate", flow_run_name="evaluate-{checkpoint}", persist_result=False)
def evaluate(
    checkpoint: CheckpointName,
    store: StoreUri | None = None,
    gpu_limit: LimitName | None = None,
    tasks: TaskNames | None = None,
    include: TaskDirectory | None = None,
    limit: Documents | None = None,
) -> EvaluationOutcome:
    """Score a committed checkpoint of any run; scores that are recorded for the same settings are reused.

    Args:
        checkpoint: the checkpoint: RUN, RUN@latest, RUN@cycle-2, RUN@warm-start, RUN@step-400, or a URI in any store
        store: directory, file:// or s3://bucket/prefix; $RELORA_STORE, else ./relora-store, when absent
        gpu_limit: global concurrency limit of which the run holds one slot while it scores; none when absent
        tasks: tasks of lm-evaluation-harness to score it by, in place of its validation split
        include: directory of the worker's machine with YAML files of tasks of your own
        limit: documents of each task; all when absent
    """
    require_limit(gpu_limit)
    selection = check_tasks(TaskSelection(tasks=tuple(tasks), include=include, limit=limit)) if tasks else None
    found = resolve_parent(checkpoint, open_run_store(store))
    with device_slot(gpu_limit):
        if selection is not None:
            return done(score_by_tasks(found, selection))
        return done(score_checkpoint(found))
