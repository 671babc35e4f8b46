"""Turn a corpus into a committed dataset."""

from __future__ import annotations

from prefect import task

from relora_train import events
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.runs.datasets import DatasetOutcome, prepare_or_reuse
from relora_train.runs.run import Run
from tasks.observe import forward_events, skipped
from tasks.policies import STORE_IO


@task(**STORE_IO, task_run_name="tokenize-{run.profile.data.name}")
def tokenize(run: Run, parent: CheckpointRef | None) -> DatasetOutcome:
    """Return the DatasetOutcome of the profile's corpus; one that is committed already is shown as Skipped."""
    outcome = prepare_or_reuse(run, parent=parent, on_event=forward_events())
    return tell_dataset(outcome)


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
