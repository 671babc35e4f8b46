"""Commands that look after what a store holds: prune, verify, pin, unpin."""

from __future__ import annotations

from typing import Annotated

import typer

from relora_train.cli.commands.options import AsJson, CheckpointName, RunName, Store, echo_json, open_named, resolve
from relora_train.cli.output import console_for_people, say
from relora_train.errors import CheckpointError


def prune(
    run: RunName,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Of every line keep the last so many.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Also keep every so many-th cycle.")] = None,
    grace_hours: Annotated[
        float, typer.Option(min=0, help="Leftovers of killed writers go when untouched for so long.")
    ] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go and why the rest stays.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints that neither the policy (these options, else the profile's) nor anything else keeps."""
    from relora_train.cli import upkeep
    from relora_train.cli.tables import show as show_view

    report = upkeep.prune(
        open_named(store), run, keep_last=keep_last, keep_every=keep_every, grace_hours=grace_hours, dry_run=dry_run
    )
    if as_json:
        echo_json(upkeep.prune_json(report))
    else:
        show_view(console_for_people(), upkeep.prune_view(report))


def verify(
    name: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run id, or any name of a checkpoint.")],
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte again and name what is missing, damaged or unreferenced; exit code 0 only for nothing."""
    from relora_train.cli import upkeep
    from relora_train.cli.tables import show as show_view

    found = upkeep.verify(open_named(store), name)
    if as_json:
        echo_json(found.to_json())
    else:
        show_view(console_for_people(), upkeep.verify_view(found))
    if not found.is_clean:
        raise typer.Exit(CheckpointError.exit_code)


def pin(
    checkpoint: CheckpointName,
    name: Annotated[str | None, typer.Option(help="Name of the pin; made from the checkpoint's when absent.")] = None,
    store: Store = None,
) -> None:
    """Keep a checkpoint from every prune until it is unpinned."""
    from relora_train.checkpoints import pins

    ref = resolve(checkpoint, store)
    say(f"{ref.uri} is pinned as {pins.pin(open_named(ref.store_uri), ref, name)}.")


def unpin(
    checkpoint: CheckpointName,
    name: Annotated[str | None, typer.Option(help="Only this pin; all of the checkpoint's when absent.")] = None,
    store: Store = None,
) -> None:
    """Remove the pins and export marks of a checkpoint."""
    from relora_train.checkpoints import pins

    ref = resolve(checkpoint, store)
    removed = pins.unpin(open_named(ref.store_uri), ref, name)
    say(f"{ref.uri} is no longer pinned as {', '.join(removed)}.")
