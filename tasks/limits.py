"""Wait for a device that several runs share: one slot of a global concurrency limit of Prefect.

A slot is a lease on the server. Guarantees:
1. A run that is killed gives its slot back: soon after the server knows of its end, else after _LEASE_SECONDS.
2. A server that is away ends no training. Up to _LEASE_SECONDS the slot is kept as well.
Both need a server that keeps leases in files. In its memory a restart loses them, and their slots stay taken:
require_limit warns, and the next run that waits frees them once no other run of that server is going on.
Not covered: a program outside of any flow run that holds a slot of the same limit at such a server.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterEndTime, FlowRunFilterState
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.states import Running

from relora_train.errors import ConfigError
from tasks.presence import LOOK_SECONDS

WAITING = "WaitingForSlot"
"""Name of a flow run's state, of type Running, while it waits."""

LEASE_STORAGE = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem"

_LEASE_SECONDS = 900.0
"""A server may be away for ten minutes, and nobody else gets the slot in the meantime."""

_RENEW_SECONDS = 30.0
_POLL_SECONDS = 10.0
_TELL_SECONDS = 600.0
_STOP_SECONDS = 5.0  # a cancelled run is killed after 30
_EMPTY_LOOKS = 3
"""A run that has just got its slot says so within one look."""

_GRACE = timedelta(seconds=3 * LOOK_SECONDS)
"""A run that was marked Crashed by mistake has said so by then."""

_log = logging.getLogger("relora_train.limits")


def require_limit(limit: str | None) -> None:
    """Raise ConfigError for a limit that does not exist; Prefect by itself would take it for no limit at all.

    Warn if the server forgets its slots' holders when it is restarted.
    """
    if limit is None:
        return
    with _client() as client:
        try:
            client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            raise _no_slot(limit, "there is no such limit") from None
        if _leases_are_in_memory(client):
            _log.warning(
                "Prefect's server keeps concurrency leases in its memory: if it is restarted while a run holds a slot "
                "of %s, the slot stays taken after that run. Start the server with %s.", limit, LEASE_STORAGE,
            )  # fmt: skip


@contextmanager
def device_slot(limit: str | None) -> Iterator[None]:
    """Hold one slot for the length of the block, waiting as long as it takes; without a limit nothing is waited for.

    Log and the flow run's state say that it waits. Raises ConfigError for a limit that was deleted; require_limit says
    so before any work.
    """
    if limit is None:
        yield
        return
    with _client() as client:
        lease = _acquire(client, limit)
        ended = threading.Event()
        in_run = contextvars.copy_context().run  # its settings and its log
        keeper = threading.Thread(target=in_run, args=(_keep, limit, lease, ended), name=f"slot {limit}", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join(_STOP_SECONDS)  # a renewal that arrives after the release would bring the lease back
            try:
                client.release_concurrency_slots_with_lease(lease)
                if (run := _flow_run()) is not None:
                    client.update_flow_run_labels(run.id, {_label(limit): ""})
            except httpx.HTTPError as error:  # the end of the run gives it back in any case
                _log.warning("a slot of %s could not be given back yet (%s)", limit, type(error).__name__)


@contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    """Return the flow run's own client: it waits while the server is away, which a new one does not."""
    context = FlowRunContext.get()
    if context is not None and isinstance(context.client, SyncPrefectClient):
        yield context.client
    else:
        with get_client(sync_client=True) as client:
            yield client


def _acquire(client: SyncPrefectClient, limit: str) -> UUID:
    run = _flow_run()
    if run is not None:  # a retry of a run that was killed: its slot is still its own
        _release_slot_of(client, client.read_flow_run(run.id), limit)
    began, told_at, empty_looks = time.monotonic(), None, 0
    while (lease := _try_once(client, limit)) is None:
        now = datetime.now(UTC)
        recent = FlowRunFilterEndTime(after_=now - timedelta(seconds=2 * _LEASE_SECONDS), before_=now - _GRACE)
        ended = _runs(client, TERMINAL_STATES, end_time=recent)
        if sum(_release_slot_of(client, each, limit) for each in ended):
            continue  # one may be free now
        tells = told_at is None or time.monotonic() - told_at >= _TELL_SECONDS
        if tells:
            _show(client, run, Running(name=WAITING, message=f"waiting for a slot of {limit}"))
        going_on = _runs(client, (StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED))
        if tells:
            told_at = time.monotonic()
            names = [repr(each.name) for each in going_on if each.labels.get(_label(limit))]
            holders = f"held by {', '.join(names)}" if names else "no run that goes on says that it holds one"
            _log.warning("waiting for a slot of %s for %.0f s: %s", limit, told_at - began, holders)
        # If every run only waits, a restart has lost the holders. The first of those that wait sees to it.
        sees_to_it = run is not None and run.id == min((each.id for each in going_on), default=None)
        nobody_holds = sees_to_it and all(each.state_name == WAITING for each in going_on)
        empty_looks = empty_looks + 1 if nobody_holds and _leases_are_in_memory(client) else 0
        if empty_looks >= _EMPTY_LOOKS:
            _log.warning(
                "No run of this server can hold the slots of %s that are taken: they are left from before a restart of "
                "the server, and freed.", limit,
            )  # fmt: skip
            client.update_global_concurrency_limit(limit, GlobalConcurrencyLimitUpdate(active_slots=0))
        else:
            time.sleep(_POLL_SECONDS)
    if run is not None:
        client.update_flow_run_labels(run.id, {_label(limit): str(lease)})
    if told_at is not None:
        _log.info("got a slot of %s after %.0f s", limit, time.monotonic() - began)
        _show(client, run, Running(message=f"holds a slot of {limit}"))
    return lease


def _try_once(client: SyncPrefectClient, limit: str) -> UUID | None:
    """Return the lease of a slot, or None if all are taken."""
    try:
        answer = client.increment_concurrency_slots_with_lease([limit], 1, "concurrency", _LEASE_SECONDS)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.LOCKED:
            return None
        raise _no_slot(limit, f"the server answers {error.response.status_code} {error.response.text[:200]}") from None
    granted = ConcurrencyLimitWithLeaseResponse.model_validate(answer.json())
    if not granted.limits:
        raise _no_slot(limit, "it was deleted")
    return granted.lease_id


def _keep(limit: str, lease: UUID, ended: threading.Event) -> None:
    """Renew a lease until `ended`. Its answer to that ends no training."""
    while not ended.wait(_RENEW_SECONDS):
        try:
            with get_client(sync_client=True) as client:
                client.renew_concurrency_lease(lease, _LEASE_SECONDS)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.GONE and not ended.is_set():
                _log.warning(
                    "Prefect's server does not know any more that this run holds a slot of %s. Training goes on; "
                    "another run may get the same device.", limit,
                )  # fmt: skip
                return
        except Exception as error:
            _log.info("the slot of %s is not renewed yet (%s)", limit, type(error).__name__)


def _release_slot_of(client: SyncPrefectClient, run: FlowRun, limit: str) -> bool:
    """Release the slot that a run noted down and did not release; True if it had one."""
    lease = run.labels.get(_label(limit))
    if not lease:
        return False
    client.release_concurrency_slots_with_lease(UUID(str(lease)))  # of a lease that is over: nothing happens
    client.update_flow_run_labels(run.id, {_label(limit): ""})
    return True


def _runs(
    client: SyncPrefectClient, types: Iterable[StateType], *, end_time: FlowRunFilterEndTime | None = None
) -> list[FlowRun]:
    state = FlowRunFilterState.model_validate({"type": {"any_": list(types)}})
    return client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state, end_time=end_time))


def _leases_are_in_memory(client: SyncPrefectClient) -> bool:
    """Return True if the server says that it keeps leases in memory."""
    try:
        settings = client.request("GET", "/admin/settings").json()
        return str(settings["server"]["concurrency"]["lease_storage"]).endswith(".memory")
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
        return False


def _show(client: SyncPrefectClient, run: FlowRun | None, state: State) -> None:
    """Set the run's state. The server rightly refuses that to a run that is being cancelled."""
    if run is not None:
        client.set_flow_run_state(run.id, state)


def _flow_run() -> FlowRun | None:
    context = FlowRunContext.get()
    return context.flow_run if context is not None else None


def _label(limit: str) -> str:
    return f"relora.slot.{limit}"


def _no_slot(limit: str, reason: str) -> ConfigError:
    return ConfigError(
        f"No slot of Prefect's global concurrency limit {limit!r} can be had: {reason}. Create it with "
        f"`prefect gcl create {limit} --limit 1` (as many as there are devices to share), or start the run without the "
        "parameter gpu_limit."
    )
