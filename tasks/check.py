"""Find out what would end a run before any work is done for it."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.method.stages import Stage
from relora_train.runs.model_check import check_run
from relora_train.runs.run import Run
from tasks.observe import forward_events
from tasks.policies import STORE_IO


@task(**STORE_IO, name="check-model", task_run_name="check-model-of-{run.run_id}")
def check_model(run: Run, stages: Sequence[Stage], parent: CheckpointRef | None) -> None:
    """Refuse a run whose model, targets, ranks or devices would end one of its stages."""
    check_run(run, stages, parent, on_event=forward_events())
