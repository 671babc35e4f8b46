"""What commands share: the options that many take, and stores and checkpoints by the names that people give."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting over the profile, e.g. relora.rank=16. Repeatable."),
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
        "directory."
    ),
]
SeriesName = Annotated[str, typer.Argument(help="Name of the series, as `relora series` shows it.")]
RunName = Annotated[str, typer.Argument(help="Run id, as `relora runs` shows it.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Prefect's log in place of the progress.")]


def open_named(uri: str | None) -> Any:
    from relora_train.runs.run import default_store_uri
    from relora_train.storage.opening import open_store

    return open_store(uri or default_store_uri())


def resolve(name: str, store: str | None) -> Any:
    from relora_train.checkpoints.names import resolve_checkpoint

    return resolve_checkpoint(name, open_named(store))


def checkpoint_json(ref: Any) -> dict[str, Any]:
    return {"uri": ref.uri, **ref.manifest.model_dump(mode="json")}


def echo_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
