"""The tree of runs as text. Pure functions; light."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.text import Text

from relora_train.checkpoints.lineage import CheckpointRef, Line
from relora_train.cli.tables import View
from relora_train.settings.keys import differing_settings
from relora_train.settings.objectives import measures_in

_SHOWN_CHANGES = 3


def lineage_view(lines: Sequence[Line], heads: Collection[str] = (), *, marked: str | None = None) -> View:
    """Return one text for each root. '●' is a run's head, '▶' the checkpoint with the URI `marked`."""
    parts: View = [Text("\n").join(_rows(line, None, heads, marked, "", "")) for line in lines]
    legend = "● head of its run" + ("   ▶ this checkpoint" if marked else "")
    return [*parts, Text(legend, style="dim")]


def lineage_record(line: Line) -> dict[str, Any]:
    """Return the same as plain data."""
    first = line.checkpoints[0].manifest
    return {
        "run_id": line.run_id,
        "parent_uri": first.parent.uri if first.parent else None,
        "checkpoints": [{"stage": ref.manifest.stage, "step": ref.step, "uri": ref.uri} for ref in line.checkpoints],
        "branches": [lineage_record(branch) for branch in line.branches],
    }


def _rows(
    line: Line, parent: CheckpointRef | None, heads: Collection[str], marked: str | None, first: str, rest: str
) -> Iterable[Text]:
    yield Text.assemble(first, *_describe(line, parent, heads, marked))
    by_fingerprint = {ref.fingerprint: ref for ref in line.checkpoints}
    for index, branch in enumerate(line.branches):
        last = index == len(line.branches) - 1
        named = branch.checkpoints[0].manifest.parent
        yield from _rows(
            branch,
            by_fingerprint.get(named.fingerprint) if named else None,
            heads,
            marked,
            rest + ("└─ " if last else "├─ "),
            rest + ("   " if last else "│  "),
        )


def _describe(
    line: Line, parent: CheckpointRef | None, heads: Collection[str], marked: str | None
) -> Iterable[str | tuple[str, str]]:
    manifest = line.checkpoints[0].manifest
    if parent is not None:
        yield f"after {parent.manifest.stage}: "
    yield (line.run_id, "bold")
    yield "  " + _stages(line.checkpoints, heads, marked)
    last = line.checkpoints[-1]
    headline = measures_in(last.manifest.evaluation).headline
    score = last.manifest.evaluation.get(headline.key)
    scored = f", {headline.name} {headline.text(score)}" if score is not None else ""
    yield (f"  step {last.step:,}{scored}", "dim")
    if parent is not None:
        yield (_changes(line.checkpoints[0], parent), "dim")
    elif manifest.parent is not None:
        yield (f"  from {manifest.parent.uri}, which is not here", "dim")


def _stages(refs: Sequence[CheckpointRef], heads: Collection[str], marked: str | None) -> str:
    """Return 'warm-start → cycle-1 → … → cycle-9': of a long line, its ends and the marked ones."""
    shown = []
    for index, ref in enumerate(refs):
        mark = ("●" if ref.uri in heads else "") + ("▶" if ref.uri == marked else "")
        if mark or len(refs) <= 6 or index < 2 or index >= len(refs) - 2:
            shown.append(mark + ref.manifest.stage)
        elif shown[-1] != "…":
            shown.append("…")
    return " → ".join(shown)


def _changes(ref: CheckpointRef, parent: CheckpointRef) -> str:
    """Settings that differ from the parent's, of those both have; where a stage is says its name."""
    theirs = parent.manifest.fingerprint_settings
    shared = {
        key: value
        for key, value in ref.manifest.fingerprint_settings.items()
        if key in theirs and not key.startswith("stage.")
    }
    lines = differing_settings(shared, {key: theirs[key] for key in shared})
    more = f" and {len(lines) - _SHOWN_CHANGES} more" if len(lines) > _SHOWN_CHANGES else ""
    return f"  ({', '.join(lines[:_SHOWN_CHANGES])}{more})" if lines else ""
