"""The options that many commands take, stores and checkpoints by the names that people give, and answers."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.cli.output import View, console_for_people, show
from relora_train.errors import ReLoRAError
from relora_train.runs.run import default_store_uri
from relora_train.settings.load import parse_override
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store, uri_to_path


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Return the runs whose names begin so of a store on this machine; of no other, as a shell does not wait."""
    uri = context.params.get("store") or default_store_uri()
    with suppress(ReLoRAError):
        runs = (uri_to_path(uri) if "://" in uri else Path(uri)) / "runs"
        return sorted(path.name for path in runs.glob("*") if path.name.startswith(incomplete))
    return []


Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting over the profile, e.g. relora.rank=16. Repeatable."),
]
Model = Annotated[
    str | None,
    typer.Option(metavar="DIR_OR_HUB_ID", help="The model to continue from: model.pretrained.", show_default=False),
]
Store = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        help="A directory, file:// or s3://bucket/prefix. Without it $RELORA_STORE, else ./relora-store.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
ProfileName = Annotated[str, typer.Argument(help="Name of a shipped profile, or path of a TOML file.")]
CheckpointName = Annotated[
    str,
    typer.Argument(
        help="RUN, RUN@latest, RUN@warm-start, RUN@cycle-2, RUN@step-400, series:NAME, or a checkpoint's URI or "
        "directory.",
        autocompletion=complete_run,
    ),
]
Include = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Tasks of your own: YAML files, with paths relative to this directory."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task; all when absent.")]
SeriesName = Annotated[str, typer.Argument(help="Name of the series, as `relora series` shows it.")]
RunName = Annotated[str, typer.Argument(help="Run id, as `relora runs` shows it.", autocompletion=complete_run)]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Prefect's log in place of the progress.")]

Pages = Annotated[bool, typer.Option("--ui", help="Start a Prefect server that shows the run until it ends.")]


def open_named(uri: str | None) -> ObjectStore:
    """Open the store of this address, or the default one."""
    return open_store(uri or default_store_uri())


def resolve(name: str, store: str | None) -> CheckpointRef:
    """Return the checkpoint of this name."""
    return resolve_checkpoint(name, open_named(store))


def with_model(sets: list[str] | None, model: str | None) -> list[str]:
    """Return what --set and --model say, as --set would."""
    return [*(sets or ()), *([f"model.pretrained={json.dumps(model)}"] if model is not None else ())]


def overrides_of(sets: list[str] | None) -> dict[str, Any]:
    """Return what --set says, as a flow's parameter. Raises ConfigError."""
    return dict(map(parse_override, sets or ()))


def answer(as_json: bool, record: Any, view: Callable[[], View]) -> None:
    """Print a command's result on standard output, as JSON or for people."""
    if as_json:
        echo_json(record)
    else:
        show(console_for_people(), view())


def echo_json(value: Any) -> None:
    """Print a record, or the JSON of a model, on standard output."""
    is_model = isinstance(value, BaseModel)
    typer.echo(value.model_dump_json(indent=1) if is_model else json.dumps(value, indent=1, ensure_ascii=False))
