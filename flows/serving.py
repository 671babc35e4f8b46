"""Serve deployments from this process: their runs start here, without work pool and worker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import load_flow_from_entrypoint
from prefect.runner import Runner
from prefect.schedules import Schedule
from prefect.types.entrypoint import EntrypointType


class OrderlyRunner(Runner):
    """Ends its runs in order when it is told to stop: each is cancelled, which lets the trainer save a snapshot.

    Prefect's own runner leaves the event loop on SIGTERM, and kills its runs without a word on the way out.
    """

    _stopped: asyncio.Task[None] | None = None

    async def serve(self, deployments: Sequence[RunnerDeployment]) -> None:
        """Register deployments and run what is asked of them until Ctrl-C or SIGTERM."""
        for deployment in deployments:
            await self.aadd_deployment(deployment)
        self._loop = asyncio.get_running_loop()
        signal.signal(signal.SIGINT, self.handle_sigterm)
        await self.start()  # takes SIGTERM by itself

    def handle_sigterm(self, *args: Any, **kwargs: Any) -> None:
        """Begin to stop; a further signal changes nothing, since Prefect bounds how long a run may take to end."""
        if self._loop is not None and self._stopped is None:
            self._loop.call_soon_threadsafe(self._stop_soon)

    def _stop_soon(self) -> None:
        if self._stopped is None:
            self._stopped = asyncio.ensure_future(self.astop())


def serve_deployments(deployments: Sequence[dict[str, Any]], *, limit: int, poll_seconds: float) -> None:
    """Register deployments as deploy/prefect.yaml describes them and run what is asked of them, until stopped.

    limit: runs at a time; the others wait. poll_seconds: how often the server is asked.
    A schedule is paused when this ends: nobody would run it.
    """
    runner = OrderlyRunner(limit=limit, query_seconds=poll_seconds, pause_on_shutdown=True)
    asyncio.run(runner.serve([_deployment(each) for each in deployments]))


def _deployment(given: dict[str, Any]) -> RunnerDeployment:
    flow: Flow[..., Any] = load_flow_from_entrypoint(given["entrypoint"])
    deployment = RunnerDeployment.from_flow(
        flow,
        given["name"],
        description=given.get("description"),
        parameters=given.get("parameters"),
        tags=given.get("tags"),
        schedules=[Schedule(**schedule) for schedule in given.get("schedules", ())],
        concurrency_limit=ConcurrencyLimitConfig(**given["concurrency_limit"]),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    # Said out loud: a deployment that was registered for a work pool before would stay with its workers.
    deployment.work_pool_name = None
    deployment.work_queue_name = None
    return deployment
