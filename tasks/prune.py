"""Prune one run."""

from __future__ import annotations

from datetime import timedelta

from prefect import task
from prefect.logging import get_run_logger
from prefect.runtime import deployment

from relora_train.checkpoints.names import list_runs
from relora_train.checkpoints.upkeep.pruning import PruneReport, prune_run
from relora_train.checkpoints.upkeep.retention import RetentionPolicy, policy_of_run
from relora_train.errors import RunInUseError
from relora_train.storage.opening import open_store
from tasks.observe import named
from tasks.policies import STORE_IO


@task(**STORE_IO, task_run_name="find-runs")
def find_runs(store_uri: str) -> list[str]:
    """Return the ids of all runs with a checkpoint."""
    return [found.run_id for found in list_runs(open_store(store_uri))]


@task(**STORE_IO, task_run_name="prune-{run_id}")
def prune_checkpoints(
    store_uri: str, run_id: str, policy: RetentionPolicy | None, grace: timedelta, dry_run: bool
) -> PruneReport:
    """Prune by the policy, else by the run's own profile; leftovers go in any case. Return the PruneReport.

    A deployment leaves a run that another prune is at to that one: AlreadyRunning.
    """
    store = open_store(store_uri)
    try:
        report = prune_run(store, run_id, policy or policy_of_run(store, run_id), grace=grace, dry_run=dry_run)
    except RunInUseError as error:
        if not deployment.id:
            raise
        nothing = PruneReport(run_id, dry_run, verdicts=(), leftovers=(), notes=(str(error),))
        return named("AlreadyRunning", nothing, str(error))
    word = "would remove" if dry_run else "removed"
    get_run_logger().info("%s: %s %d checkpoints, %d leftovers, %d bytes", run_id, word, len(report.removed),
                          len(report.leftovers), report.removed_bytes)  # fmt: skip
    return report
