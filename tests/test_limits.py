"""A slot of a device: a run that waits says so, and the slot of one that ended comes back, also from a restart."""

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.states import Completed, Crashed, Running
from prefect_server import PREFECT_WARNS, running_prefect

from relora_train.errors import ConfigError
from tasks import limits
from tasks.limits import device_slot, require_limit

pytestmark = PREFECT_WARNS
LABEL = "relora.slot.gpu"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """It keeps its leases in memory, as any server does that nobody has told otherwise."""
    with running_prefect(tmp_path_factory.mktemp("prefect")), get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="gpu", limit=1))
        yield client


@pytest.fixture
def client(server: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> SyncPrefectClient:
    monkeypatch.setattr(limits, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(limits, "_GRACE", timedelta(0))
    server.update_global_concurrency_limit("gpu", GlobalConcurrencyLimitUpdate(active_slots=0))
    return server


@flow
def some_flow() -> None:
    pass


def train(during: Callable[[], object] | None = None, before: Callable[[], object] | None = None) -> None:
    """Run a flow that holds a slot."""

    @flow
    def holding() -> None:
        if before is not None:
            before()
        with device_slot("gpu"):
            if during is not None:
                during()

    holding()


def slots_taken(client: SyncPrefectClient) -> int:
    return client.read_global_concurrency_limit_by_name("gpu").active_slots


def take_slot(client: SyncPrefectClient) -> UUID:
    answer = client.increment_concurrency_slots_with_lease(["gpu"], 1, "concurrency", 900)
    return UUID(answer.json()["lease_id"])


def this_run() -> FlowRun:
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    return context.flow_run


def in_the_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=contextvars.copy_context().run, args=(call,), daemon=True)
    thread.start()
    return thread


def until(question: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_slot_is_held_noted_down_and_given_back(client: SyncPrefectClient):
    seen: list[tuple[int, object, str | None]] = []

    def look() -> None:
        run = client.read_flow_run(this_run().id)
        seen.append((slots_taken(client), run.labels.get(LABEL), run.state_name))

    train(look)
    ((taken, lease, state),) = seen
    assert taken == 1 and UUID(str(lease)) and state == "Running", "nothing was waited for"
    assert slots_taken(client) == 0
    with pytest.raises(KeyError), device_slot("gpu"):
        raise KeyError
    assert slots_taken(client) == 0


def test_a_limit_that_is_not_there_is_refused_and_a_server_that_forgets_is_warned_of(
    client: SyncPrefectClient, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(ConfigError, match="prefect gcl create tpu --limit 1"):
        require_limit("tpu")
    with pytest.raises(ConfigError, match="'tpu' can be had: it was deleted"), device_slot("tpu"):
        pass
    require_limit("gpu")
    assert "lease_storage.filesystem" in caplog.text
    require_limit(None)


def test_a_slot_of_a_run_that_ended_is_freed_by_the_next(client: SyncPrefectClient):
    dead = client.create_flow_run(some_flow, state=Running())
    client.update_flow_run_labels(dead.id, {LABEL: str(take_slot(client))})
    client.set_flow_run_state(dead.id, Crashed())
    seen: list[int] = []
    train(lambda: seen.append(slots_taken(client)))
    assert seen == [1] and slots_taken(client) == 0
    assert client.read_flow_run(dead.id).labels[LABEL] == ""


def test_a_retry_of_a_killed_run_has_its_slot_back(client: SyncPrefectClient):
    def as_if_killed_before() -> None:
        client.update_flow_run_labels(this_run().id, {LABEL: str(take_slot(client))})

    train(before=as_if_killed_before)
    assert slots_taken(client) == 0


def test_slots_of_before_a_restart_are_freed_once_every_run_only_waits(
    client: SyncPrefectClient, caplog: pytest.LogCaptureFixture
):
    client.update_global_concurrency_limit("gpu", GlobalConcurrencyLimitUpdate(active_slots=1))
    other = client.create_flow_run(some_flow, name="other", state=Running())
    client.update_flow_run_labels(other.id, {LABEL: "a lease that the server has forgotten"})
    seen: list[int] = []
    waiter = in_the_background(lambda: train(lambda: seen.append(slots_taken(client))))
    until(lambda: "held by 'other'" in caplog.text)
    (waiting,) = (run for run in client.read_flow_runs() if run.state_name == limits.WAITING)
    assert waiting.state is not None and waiting.state.message == "waiting for a slot of gpu"
    time.sleep(20 * limits._POLL_SECONDS)
    assert seen == [] and slots_taken(client) == 1, "the other one may hold it"
    client.update_flow_run_labels(other.id, {LABEL: ""})
    client.set_flow_run_state(other.id, Completed())
    waiter.join(120)
    assert seen == [1] and slots_taken(client) == 0
    assert client.read_flow_run(waiting.id).state_name == "Completed"


def test_a_slot_that_the_server_forgot_ends_nothing(
    client: SyncPrefectClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(logging.INFO, "httpx")
    monkeypatch.setattr(limits, "_RENEW_SECONDS", 0.1)

    def forget() -> None:
        until(lambda: "/renew" in caplog.text)
        assert "not know any more" not in caplog.text
        client.release_concurrency_slots_with_lease(UUID(str(client.read_flow_run(this_run().id).labels[LABEL])))
        until(lambda: "not know any more" in caplog.text)

    train(forget)
    assert slots_taken(client) == 0
