"""`relora runs`: the runs of a store, as a list or a tree. The tree serves `relora show` too."""

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train.checkpoints.lineage import CheckpointRef, Line, draw_lineage
from relora_train.checkpoints.names import read_checkpoints, read_heads
from relora_train.cli.options import AsJson, Store, answer, open_named
from relora_train.cli.output import BLANK, View, table
from relora_train.runs.survey import FAILED, RunOverview, describe, survey_runs
from relora_train.settings.keys import differing_settings
from relora_train.settings.objectives import measures_in
from relora_train.storage.base import ObjectStore
from relora_train.text import MISSING, count, short_duration

_SHOWN_CHANGES = 3
_STATES = {"waiting": "waiting to retry", "deleting": "half deleted"}


def runs(
    tree: Annotated[bool, typer.Option("--tree", help="Show which run branched from which, and where.")] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only those that stand still before their end, with the error.")
    ] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of a store with what they do, or draw how they descend from each other."""
    opened = open_named(store)
    if tree:
        refs = read_checkpoints(opened)
        heads = read_heads(opened, refs)
        lines = draw_lineage(refs, heads)
        record = [lineage_record(line) for line in lines]
        answer(as_json, record, lambda: _inside(opened, lineage_view(lines, heads) if lines else []))
        return
    found = [each for each in survey_runs(opened) if not failed or each.state in FAILED]
    columns = ("run", "profile", "state", "step", "of", "score", "age", "held by")
    now = datetime.now(UTC)
    rows = [
        (
            it.run_id, it.profile or "damaged", _STATES.get(it.state, it.state), count(it.step),
            count(it.planned_steps), _score(it),
            short_duration(max(0.0, (now - it.modified_at).total_seconds())), it.holder or "",
        )
        for it in found
    ]  # fmt: skip
    told = [Text.assemble((f"{it.run_id} {it.state}: ", "bold"), it.message) for it in found if it.message]
    view: View = [table(columns, rows, left=("profile", "state", "held by")), *([BLANK, *told] if told else [])]
    answer(as_json, [describe(each) for each in found], lambda: _inside(opened, view if rows else [], failed=failed))


def _score(run: RunOverview) -> str:
    headline = measures_in(run.evaluation).headline
    value = run.evaluation.get(headline.key)
    return f"{headline.short} {headline.text(value)}" if value is not None else MISSING


def _inside(store: ObjectStore, view: View, *, failed: bool = False) -> View:
    if view:
        return [Text(f"In {store.uri}"), *view]
    if failed:
        return [Text(f"No run stands still before its end in {store.uri}.")]
    inside = store.local_path("runs")
    missing = inside is not None and not inside.parent.is_dir()
    return [Text(f"No run has begun in {store.uri} yet{': there is no such directory' if missing else ''}.")]


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
