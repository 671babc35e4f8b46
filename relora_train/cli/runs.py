"""`relora runs`: the runs of a store, as a list or a tree. The tree serves `relora show` too."""

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train.checkpoints.lineage import CheckpointRef, Line, draw_lineage
from relora_train.checkpoints.names import list_runs, read_checkpoints, read_heads
from relora_train.cli.options import AsJson, Store, answer, open_named
from relora_train.cli.output import View, table
from relora_train.settings.keys import differing_settings
from relora_train.settings.objectives import measures_in
from relora_train.storage.base import ObjectStore
from relora_train.text import moment

_SHOWN_CHANGES = 3


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
        record = [lineage_record(line) for line in lines]
        answer(as_json, record, lambda: _inside(opened, lineage_view(lines, heads) if lines else []))
        return
    found = list_runs(opened)
    columns = ("run", "profile", "checkpoints", "latest step", "last commit")
    rows = [
        (it.run_id, it.profile or "damaged", str(it.checkpoint_count), f"{it.latest_step:,}", moment(it.modified_at))
        for it in found
    ]
    record = [{**vars(each), "modified_at": each.modified_at.isoformat()} for each in found]
    answer(as_json, record, lambda: _inside(opened, [table(columns, rows, left=("profile",))] if rows else []))


def _inside(store: ObjectStore, view: View) -> View:
    if view:
        return [Text(f"In {store.uri}"), *view]
    inside = store.local_path("runs")
    missing = inside is not None and not inside.parent.is_dir()
    return [Text(f"No run has a checkpoint in {store.uri} yet{': there is no such directory' if missing else ''}.")]


def lineage_record(line: Line) -> dict[str, Any]:
    """Return a line and its branches as plain data."""
    first = line.checkpoints[0].manifest
    return {
        "run_id": line.run_id,
        "parent_uri": first.parent.uri if first.parent else None,
        "checkpoints": [{"stage": ref.manifest.stage, "step": ref.step, "uri": ref.uri} for ref in line.checkpoints],
        "branches": [lineage_record(branch) for branch in line.branches],
    }


def lineage_view(lines: Sequence[Line], heads: Collection[str] = (), *, marked: str | None = None) -> View:
    """Return one text for each root. '●' is a run's head, '▶' the checkpoint with the URI `marked`."""

    def rows(line: Line, parent: CheckpointRef | None, first: str, rest: str) -> Iterable[Text]:
        yield Text.assemble(first, *_describe(line, parent, heads, marked))
        by_fingerprint = {ref.fingerprint: ref for ref in line.checkpoints}
        for branch in line.branches:
            named = branch.checkpoints[0].manifest.parent
            fork, below = ("└─ ", "   ") if branch is line.branches[-1] else ("├─ ", "│  ")
            yield from rows(branch, by_fingerprint.get(named.fingerprint) if named else None, rest + fork, rest + below)

    parts: View = [Text("\n").join(rows(line, None, "", "")) for line in lines]
    legend = "● head of its run" + ("   ▶ this checkpoint" if marked else "")
    return [*parts, Text(legend, style="dim")]


def _describe(
    line: Line, parent: CheckpointRef | None, heads: Collection[str], marked: str | None
) -> Iterable[str | tuple[str, str]]:
    """Yield a run's id, its stages (of a long line, the ends and the marked ones), its score and what it changed."""
    first, last, refs = line.checkpoints[0].manifest, line.checkpoints[-1], line.checkpoints
    if parent is not None:
        yield f"after {parent.manifest.stage}: "
    yield (line.run_id, "bold")
    shown: list[str] = []
    for index, ref in enumerate(refs):
        mark = ("●" if ref.uri in heads else "") + ("▶" if ref.uri == marked else "")
        if mark or len(refs) <= 6 or index < 2 or index >= len(refs) - 2:
            shown.append(mark + ref.manifest.stage)
        elif shown[-1] != "…":
            shown.append("…")
    yield "  " + " → ".join(shown)
    headline = measures_in(last.manifest.evaluation).headline
    score = last.manifest.evaluation.get(headline.key)
    scored = f", {headline.name} {headline.text(score)}" if score is not None else ""
    yield (f"  step {last.step:,}{scored}", "dim")
    if parent is not None:
        theirs, ours = parent.manifest.fingerprint_settings, first.fingerprint_settings
        shared = [key for key in ours if key in theirs and not key.startswith("stage.")]  # its name says where it is
        changes = differing_settings({key: ours[key] for key in shared}, {key: theirs[key] for key in shared})
        more = f" and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
        yield (f"  ({', '.join(changes[:_SHOWN_CHANGES])}{more})" if changes else "", "dim")
    elif first.parent is not None:
        yield (f"  from {first.parent.uri}, which is not here", "dim")
