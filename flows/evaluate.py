"""Evaluate any checkpoint on demand: perplexity on its validation split, and samples."""

from __future__ import annotations

from prefect import flow

from flows.parameters import CheckpointName, LimitName, StoreUri
from relora_train.runs.evaluations import EvaluationOutcome
from tasks.limits import device_slot, require_limit
from tasks.observe import done
from tasks.run import score_checkpoint
from tasks.store import open_run_store, resolve_parent


@flow(name="evaluate", flow_run_name="evaluate-{checkpoint}", persist_result=False)
def evaluate(
    checkpoint: CheckpointName, store: StoreUri | None = None, gpu_limit: LimitName | None = None
) -> EvaluationOutcome:
    """Score a committed checkpoint of any run; scores that are recorded for the same settings are reused.

    Args:
        checkpoint: the checkpoint: RUN, RUN@latest, RUN@cycle-2, RUN@warm-start, RUN@step-400, or a URI in any store
        store: directory, file:// or s3://bucket/prefix; $RELORA_STORE, else ./relora-store, when absent
        gpu_limit: global concurrency limit of which the run holds one slot while it scores; none when absent
    """
    require_limit(gpu_limit)
    found = resolve_parent(checkpoint, open_run_store(store))
    with device_slot(gpu_limit):
        return done(score_checkpoint(found))
