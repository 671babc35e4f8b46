"""`relora serve`: the deployments of deploy/prefect.yaml without a work pool or a worker."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from relora_train.cli.local_flow import load_installed, set_orchestrator_environment
from relora_train.cli.local_server import check_server, users_server
from relora_train.cli.output import console_for_people
from relora_train.errors import ConfigError
from relora_train.runs.run import STORE_VARIABLE, default_store_uri

_PACKAGE = Path(__file__).resolve().parents[1]


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
    api_url = users_server()
    if not api_url:
        raise ConfigError(
            "PREFECT_API_URL names no Prefect server, and served deployments need one that outlives this command. "
            "Start it with `prefect server start`, then `export PREFECT_API_URL=http://127.0.0.1:4200/api`."
        )
    check_server(api_url)
    for deployment in chosen:
        for variable, value in deployment["work_pool"]["job_variables"]["env"].items():
            os.environ.setdefault(variable, value)  # runs inherit it from us, as from a worker
    set_orchestrator_environment(verbose=True)
    os.environ.setdefault(STORE_VARIABLE, default_store_uri())
    start, console = load_installed("serve", "relora_train.services"), console_for_people()

    def show() -> None:
        console.print(f"Serving at {api_url}, into {os.environ[STORE_VARIABLE]}. Ctrl-C ends it.", soft_wrap=True)
        for deployment in chosen:
            console.print(f"  {deployment['full_name']:<22}{deployment['description']}", soft_wrap=True)

    start(chosen, limit=limit, poll_seconds=poll, take_over=take_over, on_start=show)


def deployments_file() -> Path:
    """Return the file that ships with the project: in deploy/ of a checkout, inside the wheel when installed."""
    inside_wheel = _PACKAGE / "_deploy" / "prefect.yaml"
    return inside_wheel if inside_wheel.is_file() else _PACKAGE.parent / "deploy" / "prefect.yaml"


def choose_deployments(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the deployments of these names, all of them for none. Raises ConfigError for one that does not exist.

    Each is as Prefect's own `deploy` reads it, with `full_name`: pretrain/quickstart.
    """
    content = yaml.safe_load(deployments_file().read_text(encoding="utf-8"))
    known = {}
    for each in content["deployments"]:
        name = f"{each['entrypoint'].rpartition(':')[2]}/{each['name']}"  # our flows are named as their functions
        known[name] = {**each, "full_name": name}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"There is no deployment {unknown[0]!r}. There are: {', '.join(known)}.")
    return [each for name, each in known.items() if not names or name in names]
