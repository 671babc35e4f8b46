"""Serve deployments from this process: their runs start here, without work pool and worker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.flows import load_flow_from_entrypoint
from prefect.runner import Runner
from prefect.schedules import Schedule
from prefect.states import Cancelled
from prefect.types.entrypoint import EntrypointType

from relora_train.errors import ConfigError, OrchestratorError
from tasks.deployed import server_errors


class OrderlyRunner(Runner):
    """A runner that ends in order: its runs are cancelled, which lets their trainers save a snapshot.

    Prefect's own runner leaves the event loop on SIGTERM, and kills its runs without a word on the way out.
    """

    _serving: asyncio.Task[None] | None = None
    _told_to_stop = False

    async def serve(
        self, deployments: Sequence[RunnerDeployment], *, take_over: bool, on_start: Callable[[], None]
    ) -> None:
        """Run what is asked of deployments until Ctrl-C, SIGTERM or SIGHUP.

        A deployment that the server does not have yet is registered. One that belongs to a work pool is taken off it
        and otherwise left as it is; it is given back at the end. Raises ConfigError for such a one without `take_over`.
        """
        self._loop, self._serving = asyncio.get_running_loop(), asyncio.current_task()
        async with get_client() as client:
            pooled = await _belonging_to_a_pool(client, deployments)
            if pooled and not take_over:
                raise ConfigError(
                    f"{', '.join(f'{name} (pool {each.work_pool_name})' for name, each in pooled.items())}: served, "
                    "their runs would start here and no longer on the workers of their pool. Serve other deployments, "
                    "start a worker with `prefect worker start --pool POOL`, or serve these with --take-over: they "
                    "are given back to their pool when this ends."
                )
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    signal.signal(number, self.handle_sigterm)
            with suppress(asyncio.CancelledError):  # told to stop before it had begun
                async with _given_back(client, list(pooled.values())):
                    for deployment in deployments:
                        if known := pooled.get(deployment.full_name):
                            # Prefect's runner finds a flow by its module, its workers by module and colon.
                            here = DeploymentUpdate(
                                work_pool_name=None, work_queue_name=None, entrypoint=deployment.entrypoint
                            )
                            await client.update_deployment(known.id, here)
                            self._deployment_registry.register_deployment(known.id, known.name)
                        else:
                            await self.aadd_deployment(deployment)
                    on_start()
                    await self.start()  # takes SIGTERM by itself

    def handle_sigterm(self, *args: Any, **kwargs: Any) -> None:
        """Begin to stop; a further signal changes nothing, since Prefect bounds how long a run may take to end."""
        if self._loop is not None and not self._told_to_stop:
            self._told_to_stop = True
            self._loop.call_soon_threadsafe(self._stop_soon)

    def _stop_soon(self) -> None:
        if self.started:
            self._stopped = asyncio.ensure_future(self.astop())
        elif self._serving is not None:
            self._serving.cancel()


async def _belonging_to_a_pool(
    client: PrefectClient, deployments: Sequence[RunnerDeployment]
) -> dict[str, DeploymentResponse]:
    found = {}
    for deployment in deployments:
        with suppress(ObjectNotFound):
            known = await client.read_deployment_by_name(deployment.full_name)
            if known.work_pool_name is not None:
                found[deployment.full_name] = known
    return found


@asynccontextmanager
async def _given_back(client: PrefectClient, deployments: Sequence[DeploymentResponse]) -> AsyncIterator[None]:
    """Give deployments that the block takes off their work pools back to them, however it ends.

    A run that somebody asked for meanwhile and that has not begun is cancelled: no worker would ever look for it.
    """
    try:
        yield
    finally:
        failed = []
        for each in deployments:
            try:
                await _give_back(client, each)
            except ObjectNotFound:
                continue  # deleted meanwhile
            except httpx.HTTPError as error:
                failed.append(f"{each.name} to {each.work_pool_name} ({type(error).__name__})")
        if failed:
            raise OrchestratorError(
                f"Prefect's server did not let deployments be given back to their work pools: {', '.join(failed)}. "
                "Until they are deployed again, no worker gets their runs: `prefect deploy` as in deploy/README.md."
            )


async def _give_back(client: PrefectClient, before: DeploymentResponse) -> None:
    if (await client.read_deployment(before.id)).work_pool_name is not None:
        return  # deployed again meanwhile
    waiting = await client.read_flow_runs(
        deployment_filter=DeploymentFilter.model_validate({"id": {"any_": [before.id]}}),
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}}),
    )
    for run in waiting:
        if run.work_pool_name is None:
            told = "`relora serve` ended before this run began. Start it again, for the deployment's work pool."
            await client.set_flow_run_state(run.id, Cancelled(message=told))
    as_before = before.model_dump(include={"work_pool_name", "work_queue_name", "entrypoint", "paused"})
    await client.update_deployment(before.id, DeploymentUpdate.model_validate(as_before))


def serve_deployments(
    deployments: Sequence[dict[str, Any]],
    *,
    limit: int,
    poll_seconds: float,
    take_over: bool,
    on_start: Callable[[], None],
) -> None:
    """Run what is asked of deployments, as deploy/prefect.yaml describes them, until stopped.

    limit: runs at a time; the others wait. poll_seconds: how often the server is asked. take_over: serve also those of
    a work pool, and give them back at the end. Others are paused when this ends: nobody would run their schedules.
    Serving or deploying them again resumes them.
    """
    runner = OrderlyRunner(limit=limit, query_seconds=poll_seconds, pause_on_shutdown=True)
    served = []
    for given in deployments:
        flow: Flow[..., Any] = load_flow_from_entrypoint(given["entrypoint"])
        schedules = [Schedule(**schedule) for schedule in given.get("schedules", ())]
        served.append(
            RunnerDeployment.from_flow(
                flow,
                given["name"],
                description=given.get("description"),
                parameters=given.get("parameters"),
                tags=given.get("tags"),
                schedules=schedules,
                entrypoint_type=EntrypointType.MODULE_PATH,
            )
        )
    with server_errors():
        asyncio.run(runner.serve(served, take_over=take_over, on_start=on_start))
