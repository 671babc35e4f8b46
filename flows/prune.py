"""Prune the runs of a store: what their retention policy lets go, and what killed writers left behind."""

from __future__ import annotations

from datetime import timedelta

from prefect import flow
from pydantic import NonNegativeFloat, PositiveInt

from flows.parameters import RunId, StoreUri
from relora_train.checkpoints.upkeep.pruning import PruneReport
from relora_train.checkpoints.upkeep.retention import RetentionPolicy
from tasks.observe import done
from tasks.prune import find_runs, prune_checkpoints
from tasks.store import open_run_store


@flow(name="prune", persist_result=False)
def prune(
    store: StoreUri | None = None,
    run_id: RunId | None = None,
    keep_last: PositiveInt | None = None,
    keep_every: PositiveInt | None = None,
    grace_hours: NonNegativeFloat = 24,
    dry_run: bool = False,
) -> list[PruneReport]:
    """Prune one run, or every run of a store. To be scheduled; safe beside running flows.

    Args:
        store: directory, file:// or s3://bucket/prefix; $RELORA_STORE, else ./relora-store, when absent
        run_id: the run; all runs when absent
        keep_last: of every line keep the last so many; [retention] of the run's profile when neither is given
        keep_every: also keep every so many-th cycle
        grace_hours: leftovers of killed writers go when nothing was added to them for so long
        dry_run: only report
    """
    policy = None if keep_last is None and keep_every is None else RetentionPolicy(keep_last, keep_every)
    store_uri, grace = open_run_store(store), timedelta(hours=grace_hours)
    runs = [run_id] if run_id else find_runs(store_uri)
    return [done(prune_checkpoints(store_uri, run, policy, grace, dry_run)) for run in runs]
