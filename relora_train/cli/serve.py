"""relora serve: the deployments of deploy/prefect.yaml without a work pool or a worker. Imports no Prefect."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

from relora_train.cli.deployments import choose_deployments
from relora_train.cli.local_flow import set_orchestrator_environment
from relora_train.cli.local_server import check_server
from relora_train.cli.output import console_for_people
from relora_train.errors import ConfigError
from relora_train.runs.run import STORE_VARIABLE, default_store_uri

SERVICES_GROUP = "relora_train.services"


def serve(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[FLOW/NAME]...", help="Deployments to serve; all when absent.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Runs at a time; the others wait.")] = 1,
    poll: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="How often the server is asked.")] = 5,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Serve deployments of a work pool too; given back to it at the end.")
    ] = False,
) -> None:
    """Run the deployments of deploy/prefect.yaml from here, for the Prefect server that $PREFECT_API_URL names."""
    chosen = choose_deployments(names or ())
    api_url = _users_server()
    for deployment in chosen:
        for variable, value in deployment["work_pool"]["job_variables"]["env"].items():
            os.environ.setdefault(variable, value)  # runs inherit it from us, as from a worker
    set_orchestrator_environment(verbose=True)
    os.environ.setdefault(STORE_VARIABLE, default_store_uri())
    start, console = _service("serve"), console_for_people()

    def show() -> None:
        console.print(f"Serving at {api_url}, into {os.environ[STORE_VARIABLE]}. Ctrl-C ends it.", soft_wrap=True)
        for deployment in chosen:
            console.print(f"  {deployment['full_name']:<22}{deployment['description']}", soft_wrap=True)

    start(chosen, limit=limit, poll_seconds=poll, take_over=take_over, on_start=show)


def _users_server() -> str:
    api_url = os.environ.get("PREFECT_API_URL")
    if not api_url:
        raise ConfigError(
            "PREFECT_API_URL names no Prefect server, and served deployments need one that outlives this command. "
            "Start it with `prefect server start`, then `export PREFECT_API_URL=http://127.0.0.1:4200/api`."
        )
    check_server(api_url)
    return api_url


def _service(name: str) -> Callable[..., Any]:
    found = {entry.name: entry for entry in entry_points(group=SERVICES_GROUP)}
    if name not in found:
        raise ConfigError(
            f"The part {name!r} is not installed. Install the package itself, with `pip install -e .` in a checkout."
        )
    service: Callable[..., Any] = found[name].load()
    return service
