"""The stages of a run, one after the other: what the flows that train have in common."""

from __future__ import annotations

from collections.abc import Sequence

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.method.stages import Stage
from relora_train.runs.run import DatasetRef, Run, StageOutcome
from tasks.observe import done
from tasks.train import store_checkpoint, train_cycle, warm_start


def train_stages(
    run: Run, stages: Sequence[Stage], dataset: DatasetRef, parent: CheckpointRef | None
) -> list[StageOutcome]:
    """Train each stage from the one before; all of them are stored when this returns.

    A run with a publisher stores one while the next trains, never more: the next is handed over, and the one after it
    begun, when this one's turn to be stored is over. A trained stage is stored, also when the next one fails.
    """
    outcomes: list[StageOutcome] = []
    for stage in stages:
        train = train_cycle if stage.low_rank else warm_start
        try:
            outcome = done(train(run, stage, dataset, parent))
        except Exception:
            _stored(run, outcomes)
            raise
        outcomes = [*_stored(run, outcomes), outcome]
        parent = outcome.checkpoint
    return _stored(run, outcomes)


def _stored(run: Run, outcomes: list[StageOutcome]) -> list[StageOutcome]:
    return [outcome if outcome.stored else store_checkpoint(run, outcome) for outcome in outcomes]
