"""Wait for a device that several runs share: one slot of a global concurrency limit of Prefect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from relora_train.errors import ConfigError

_LEASE_SECONDS = 120.0
"""After so long without a sign of life Prefect gives the slot of a killed run to the next one."""


def require_limit(limit: str | None) -> None:
    """Raise ConfigError for a limit that does not exist; Prefect by itself would take it for no limit at all."""
    if limit is None:
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            raise _no_slot(limit, "there is no such limit") from None


@contextmanager
def device_slot(limit: str | None) -> Iterator[None]:
    """Hold one slot for the length of the block, waiting as long as it takes; without a limit nothing is waited for.

    A slot that is lost because Prefect's server was away ends no training. Raises ConfigError for a limit that was
    deleted; require_limit says so before any work.
    """
    with ExitStack() as held:
        if limit is not None:
            slot = concurrency(
                limit, occupy=1, strict=True, lease_duration=_LEASE_SECONDS, raise_on_lease_renewal_failure=False
            )
            try:
                held.enter_context(slot)
            except ConcurrencySlotAcquisitionError as error:
                raise _no_slot(limit, str(error)) from None
        yield


def _no_slot(limit: str, reason: str) -> ConfigError:
    return ConfigError(
        f"No slot of Prefect's global concurrency limit {limit!r} can be had: {reason}. Create it with "
        f"`prefect gcl create {limit} --limit 1` (as many as there are devices to share), or start the run without the "
        "parameter gpu_limit."
    )
