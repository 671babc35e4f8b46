"""Run flows where there is no Prefect server: the same functions, in the same order, without a record beside the store.

Prefect runs tasks on the client's side: they keep their names, states, log and retries, and report to nobody. A flow
cannot run so, and its function is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from prefect import Flow
from prefect.context import SyncClientContext
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL

from relora_train.process import NO_SERVER
from tasks.observe import done

T = TypeVar("T")


def has_server() -> bool:
    """Return True if states, artifacts and limits have a place to go."""
    return bool(PREFECT_API_URL.value() != NO_SERVER)


def call_flow(flow: Flow[..., T], parameters: Mapping[str, Any]) -> T:
    """Run a flow with its parameters checked, on the server or without one, and return its result."""
    if has_server():
        return cast(T, flow(**parameters))
    EventsWorker.set_client_override(NullEventsClient)  # else the states of tasks wait for a server to be told to
    with SyncClientContext.get_or_create():  # else each task makes a client, which reads all certificates: 0.06 s
        return done(flow.fn(**flow.validate_parameters(dict(parameters))))
