"""What the server says of a flow run is put right by the run: it lives, or somebody wants it to stop."""

import signal
import time
from collections.abc import Iterator

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelling, Crashed
from prefect_server import PREFECT_WARNS, running_prefect

from tasks import presence

pytestmark = PREFECT_WARNS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    with running_prefect(tmp_path_factory.mktemp("prefect")), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def client(server: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> SyncPrefectClient:
    monkeypatch.setattr(presence, "LOOK_SECONDS", 0.1)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "deployed")
    return server


def marked(client: SyncPrefectClient, state: object, *, until: str, seconds: float) -> str | None:
    """The name of a run's state after it was set to `state`, as soon as it is `until`."""
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    client.set_flow_run_state(context.flow_run.id, state)  # type: ignore[arg-type]
    deadline = time.monotonic() + seconds
    while (name := client.read_flow_run(context.flow_run.id).state_name) != until and time.monotonic() < deadline:
        time.sleep(0.1)
    return name


def test_a_run_that_was_marked_as_dead_and_lives_is_running_again(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
):
    @flow
    def alive() -> str | None:
        with presence.present():
            return marked(client, Crashed(), until="Running", seconds=120)

    assert alive() == "Running"
    assert [run.state_name for run in client.read_flow_runs()] == ["Completed"]
    monkeypatch.delenv("PREFECT__RUNTIME__DEPLOYMENT__ID")

    @flow
    def undeployed() -> str | None:
        with presence.present():
            return marked(client, Crashed(), until="Running", seconds=2)

    assert undeployed() == "Crashed", "nobody marks a run without a deployment but by its own end"


def test_a_cancellation_that_nobody_passes_on_stops_the_run(client: SyncPrefectClient):
    @flow
    def cancelled() -> None:
        with presence.present():
            marked(client, Cancelling(), until="never", seconds=120)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # Prefect sends it once more, for whoever had it before
    try:
        with pytest.raises(TerminationSignal):
            cancelled()
    finally:
        signal.signal(signal.SIGTERM, before)
    runs = {run.state_name for run in client.read_flow_runs(limit=10)}
    assert "Crashed" in runs and "Cancelling" not in runs
