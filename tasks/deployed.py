"""Have runs made by a deployment, side by side, wherever its workers are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from relora_train.errors import ConfigError, DivergedError, OrchestratorError, TrainerCrashedError
from tasks.alone import has_server

_POLL_SECONDS = 3.0


@contextmanager
def server_errors() -> Iterator[None]:
    """Raise OrchestratorError for a Prefect server that does not answer, or answers a request with an error."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        answer, request = error.response, error.request
        raise OrchestratorError(
            f"Prefect's server answered {request.method} {request.url.copy_with(username=None, password=None)} with "
            f"{answer.status_code} {answer.reason_phrase}: {answer.text[:300]}. Look into its log; then start again."
        ) from None
    except httpx.HTTPError as error:
        raise OrchestratorError(
            f"Prefect's server, which PREFECT_API_URL names, does not answer ({type(error).__name__}: {error}). "
            "Bring it back; then start again."
        ) from None


def require_deployment(name: str | None) -> None:
    """Raise ConfigError for a deployment that Prefect's server does not know."""
    if name is None:
        return
    if has_server():
        with suppress(ObjectNotFound, ValueError), server_errors(), get_client(sync_client=True) as client:
            client.read_deployment_by_name(name)  # ValueError: a name without its slash
            return
    raise ConfigError(
        f"Prefect's server knows no deployment {name!r}. Set PREFECT_API_URL to a server that has it "
        "(`prefect deployment ls`), or leave it out: the runs are then made one after another, here."
    )


def run_deployed(deployment: str, runs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, DivergedError | None]]:
    """Start a run of the deployment for each name with its parameters; give each name that ended, and how it diverged.

    Raises TrainerCrashedError, when all have ended, for those that ended neither well nor by divergence. If the server
    is lost, it raises OrchestratorError at once. The runs go on then, as they do if you stop what waits for them; asked
    for again while one still works, its run id is in use.
    """
    waiting: dict[str, UUID] = {}
    for name, parameters in runs.items():
        with server_errors():
            started = run_deployment(deployment, parameters=dict(parameters), flow_run_name=name, timeout=0)
        waiting[name] = cast(FlowRun, started).id  # outside of an event loop it is the run, not a coroutine
    failed = []
    with get_client(sync_client=True) as client:
        while waiting:
            time.sleep(_POLL_SECONDS)
            for name, flow_run_id in list(waiting.items()):
                with server_errors():
                    state = client.read_flow_run(flow_run_id).state
                if state is None or not state.is_final():
                    continue
                del waiting[name]
                # The error of a run elsewhere: of one that diverged, the state holds the text.
                _, marker, message = (state.message or "").partition(f"{DivergedError.__name__}: ")
                if state.is_completed() or (state.is_failed() and marker):
                    yield name, DivergedError(message) if state.is_failed() else None
                else:
                    failed.append(f"{name}: {state.name}: {state.message}")
    if failed:
        shown = "".join(f"\n  - {each}" for each in failed)
        raise TrainerCrashedError(
            f"{len(failed)} of {len(runs)} runs of {deployment} did not end well:{shown}\n"
            "What is committed is kept; the same command goes on from there."
        )
