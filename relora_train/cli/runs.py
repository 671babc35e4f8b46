"""`relora runs`: the runs of a store, as a list or a tree."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from relora_train.checkpoints.lineage import draw_lineage
from relora_train.checkpoints.names import list_runs, read_checkpoints, read_heads
from relora_train.cli.lineage_view import lineage_record, lineage_view
from relora_train.cli.options import AsJson, Store, answer, open_named
from relora_train.cli.tables import View, rows_table
from relora_train.storage.base import ObjectStore
from relora_train.text import moment


def runs(
    tree: Annotated[bool, typer.Option("--tree", help="Show which run branched from which, and where.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of a store, or draw how they descend from each other."""
    opened = open_named(store)
    if tree:
        refs = read_checkpoints(opened)
        heads = read_heads(opened, refs)
        lines = draw_lineage(refs, heads)
        answer(
            as_json,
            record=lambda: [lineage_record(line) for line in lines],
            view=lambda: _inside(opened, lineage_view(lines, heads) if lines else []),
        )
        return
    found = list_runs(opened)
    columns = ("run", "profile", "checkpoints", "latest step", "last commit")
    rows = [
        (
            each.run_id,
            each.profile or "damaged",
            str(each.checkpoint_count),
            f"{each.latest_step:,}",
            moment(each.modified_at),
        )
        for each in found
    ]
    answer(
        as_json,
        record=lambda: [{**vars(each), "modified_at": each.modified_at.isoformat()} for each in found],
        view=lambda: _inside(opened, [rows_table(columns, rows, left=("profile",))] if rows else []),
    )


def _inside(store: ObjectStore, view: View) -> View:
    if view:
        return [Text(f"In {store.uri}"), *view]
    inside = store.local_path("runs")
    missing = inside is not None and not inside.parent.is_dir()
    return [Text(f"No run has a checkpoint in {store.uri} yet{': there is no such directory' if missing else ''}.")]
