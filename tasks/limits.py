"""Wait for a device that several runs share: one slot of a global concurrency limit of Prefect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency

from relora_train.errors import ConfigError

_LEASE_SECONDS = 120.0
"""After so long without a sign of life Prefect gives the slot of a killed run to the next one."""


@contextmanager
def device_slot(limit: str | None) -> Iterator[None]:
    """Hold one slot for the length of the block, waiting as long as it takes; without a limit nothing is waited for.

    A slot that is lost because Prefect's server was away ends no training. Raises ConfigError for a limit that does not
    exist: Prefect by itself would take that for no limit at all.
    """
    with ExitStack() as held:
        if limit is not None:
            slot = concurrency(
                limit, occupy=1, strict=True, lease_duration=_LEASE_SECONDS, raise_on_lease_renewal_failure=False
            )
            try:
                held.enter_context(slot)
            except ConcurrencySlotAcquisitionError as error:
                raise ConfigError(
                    f"No slot of Prefect's global concurrency limit {limit!r} was given: {error}. Create it with "
                    f"`prefect gcl create {limit} --limit 1` (as many as there are devices to share), or start the run "
                    "without the parameter gpu_limit."
                ) from None
        yield
