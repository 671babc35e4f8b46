"""Commands that look at a store: runs, checkpoints, show."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train.cli.commands.options import (
    AsJson,
    CheckpointName,
    RunName,
    Store,
    checkpoint_json,
    echo_json,
    open_named,
    resolve,
)
from relora_train.cli.output import complain, console_for_people, say
from relora_train.errors import CheckpointError


def runs(
    tree: Annotated[bool, typer.Option("--tree", help="Show which run branched from which, and where.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of a store, or draw how they descend from each other."""
    from relora_train.checkpoints.all_runs import list_runs
    from relora_train.cli.tables import runs_view
    from relora_train.cli.tables import show as show_view

    opened = open_named(store)
    if tree:
        _print_tree(opened, as_json=as_json)
        return
    found = list_runs(opened)
    if as_json:
        echo_json([{**vars(info), "modified_at": info.modified_at.isoformat()} for info in found])
    elif found:
        show_view(console_for_people(), [Text(f"In {opened.uri}"), *runs_view(found)])
    else:
        _say_empty(opened)


def checkpoints(run: RunName, store: Store = None, as_json: AsJson = False) -> None:
    """List the committed checkpoints of a run."""
    from relora_train.checkpoints.lineage import line_to
    from relora_train.checkpoints.names import resolve_checkpoint
    from relora_train.checkpoints.run import CheckpointStore
    from relora_train.cli.tables import checkpoints_view
    from relora_train.cli.tables import show as show_view
    from relora_train.errors import CheckpointAmbiguousError, CheckpointCorruptError

    held = CheckpointStore(open_named(store), run)
    refs, faults = held.survey()
    if not refs and not faults:
        resolve_checkpoint(f"{run}@latest", held.store)  # raises what is to be said of a run without checkpoints
    try:
        latest = held.latest()
    except (CheckpointAmbiguousError, CheckpointCorruptError):
        latest = None
    line = line_to(latest, refs) if latest else ()
    if as_json:
        echo_json([{**checkpoint_json(ref), "on_line": ref in line} for ref in refs])
    else:
        show_view(console_for_people(), checkpoints_view(refs, line))
    for fault in faults:
        complain(str(fault))
    if faults:
        raise typer.Exit(CheckpointError.exit_code)


def show(
    checkpoint: CheckpointName,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and check it first.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of a checkpoint: scores, lineage, files, merge."""
    from relora_train.checkpoints.all_runs import read_checkpoints, read_heads
    from relora_train.checkpoints.fetch import verify_bundle
    from relora_train.checkpoints.lineage import draw_lineage
    from relora_train.cli.lineage_view import lineage_record, lineage_view
    from relora_train.cli.tables import checkpoint_view
    from relora_train.cli.tables import show as show_view
    from relora_train.runs.run import line_of

    ref = resolve(checkpoint, store)
    if verify:
        verify_bundle(open_named(ref.store_uri), ref.prefix, ref.manifest)
    line = line_of(ref)
    known = [*read_checkpoints(open_named(ref.store_uri)), *line]
    heads = read_heads(open_named(ref.store_uri), known)
    roots = [
        root
        for root in draw_lineage(known, heads)
        if any(ref.uri == one.uri for part in root.all_lines() for one in part.checkpoints)
    ]
    if as_json:
        lineage = [{"stage": one.manifest.stage, "step": one.step, "uri": one.uri} for one in line]
        echo_json({**checkpoint_json(ref), "lineage": lineage, "tree": lineage_record(roots[0]), "verified": verify})
        return
    verified = [Text("Every file is as its manifest says.")] if verify else []
    tree = [Text(""), Text("Runs it belongs with", style="bold"), *lineage_view(roots, heads, marked=ref.uri)]
    show_view(console_for_people(), [*checkpoint_view(ref, line), *(tree if roots[0].branches else []), *verified])


def _print_tree(store: Any, *, as_json: bool) -> None:
    from relora_train.checkpoints.all_runs import read_checkpoints, read_heads
    from relora_train.checkpoints.lineage import draw_lineage
    from relora_train.cli.lineage_view import lineage_record, lineage_view
    from relora_train.cli.tables import show as show_view

    refs = read_checkpoints(store)
    heads = read_heads(store, refs)
    lines = draw_lineage(refs, heads)
    if as_json:
        echo_json([lineage_record(line) for line in lines])
    elif lines:
        show_view(console_for_people(), [Text(f"In {store.uri}"), *lineage_view(lines, heads)])
    else:
        _say_empty(store)


def _say_empty(store: Any) -> None:
    inside = store.local_path("runs")
    missing = inside is not None and not inside.parent.is_dir()
    say(f"No run has a checkpoint in {store.uri} yet{': there is no such directory' if missing else ''}.")
