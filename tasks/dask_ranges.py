"""Ranges of a dataset, encoded by the workers of a Dask cluster through Prefect's Dask task runner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import copy_context

from prefect import task
from prefect.context import TaskRunContext

from relora_train.data.remote_shards import MapRanges, RangeJob, encode_range
from relora_train.data.shards import ShardRecord
from relora_train.errors import ClusterUnavailableError, ConfigError
from tasks.alone import has_server
from tasks.policies import STORE_IO

_WAIT_SECONDS = 60


@task(**STORE_IO, task_run_name="encode-{job.staged.name}")
def encode_on_worker(job: RangeJob) -> ShardRecord:
    """Make the shard of one range on a worker, which has the store's credentials in its own environment."""
    return encode_range(job)


def ranges_on(address: str | None) -> MapRanges | None:
    """Return what has ranges encoded by the cluster whose scheduler is at an address; None without one."""
    if address is None:
        return None
    if not has_server():
        raise ConfigError(
            f"data.dask = {address!r} needs a Prefect server that its workers reach too: set PREFECT_API_URL here and "
            "where they run, or leave data.dask out to encode on this machine."
        )
    try:
        import distributed
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError:
        raise ConfigError(
            f"data.dask = {address!r} needs Dask, which is not installed: pip install 'relora-train[dask]', here and "
            "where the workers run. Or leave data.dask out to encode on this machine."
        ) from None

    def map_ranges(jobs: Iterable[RangeJob]) -> Iterator[tuple[RangeJob, ShardRecord]]:
        # A worker gets the flow's context. That of the task at work here cannot travel: its parameters hold a lease.
        context = copy_context()
        context.run(TaskRunContext.__var__.set, None)  # type: ignore[arg-type]
        with DaskTaskRunner(address=address, client_kwargs={"timeout": _WAIT_SECONDS}) as runner:
            try:
                runner.client.wait_for_workers(1, timeout=_WAIT_SECONDS)
            except OSError as error:
                raise ClusterUnavailableError(
                    f"No worker of the Dask cluster at {address} answered within {_WAIT_SECONDS} s: {error}. See to "
                    "its scheduler and workers, correct data.dask, or leave it out to encode on this machine."
                ) from error
            futures = {context.run(runner.submit, encode_on_worker, {"job": job}).wrapped_future: job for job in jobs}
            done = distributed.as_completed(futures, loop=runner.client.loop)  # type: ignore[no-untyped-call]
            try:
                for future in done:
                    yield futures[future], future.result().result()
            except distributed.KilledWorker as error:
                raise ClusterUnavailableError(
                    f"The same range ended several workers of the Dask cluster at {address}: {error}. Give them more "
                    "memory (300 MB each suffice), then run again: finished ranges are kept."
                ) from error

    return map_ranges
