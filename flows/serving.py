"""Serve deployments from this process: their runs start here, without work pool and worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.schedules import Schedule
from prefect.types.entrypoint import EntrypointType


def serve_deployments(deployments: Sequence[dict[str, Any]], *, limit: int, poll_seconds: float) -> None:
    """Register deployments as deploy/prefect.yaml describes them and run what is asked of them, until stopped.

    limit: runs at a time; the others wait. poll_seconds: how often the server is asked.
    A schedule is paused when this ends: nobody would run it.
    """
    serve(
        *(_deployment(each) for each in deployments),
        limit=limit,
        query_seconds=poll_seconds,
        print_starting_message=False,
    )


def _deployment(given: dict[str, Any]) -> RunnerDeployment:
    flow: Flow[..., Any] = load_flow_from_entrypoint(given["entrypoint"])
    return RunnerDeployment.from_flow(
        flow,
        given["name"],
        description=given.get("description"),
        parameters=given.get("parameters"),
        tags=given.get("tags"),
        schedules=[Schedule(**schedule) for schedule in given.get("schedules", ())],
        concurrency_limit=ConcurrencyLimitConfig(**given["concurrency_limit"]),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
