"""What the `relora` command prints: records of the library as rich tables. Light; decides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from relora_train.checkpoints.all_runs import RunInfo
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.cli.plan_tables import sections
from relora_train.runs.divergence import divergence_text
from relora_train.runs.plan import Plan
from relora_train.settings.measures import LOSS, Measure
from relora_train.settings.objectives import measures_in
from relora_train.text import decimal, duration, moment, size

_SAMPLE_CHARACTERS = 240
_MERGE_NUMBERS = (("relative_update_norm", 4), ("effective_rank", 1))
BLANK = Text("")

View = list[RenderableType]
"""Parts to print one after the other."""


def table(*columns: str, title: str | None = None, left: Sequence[str] = ()) -> Table:
    """A plain table; all columns but the first and those named in `left` are numbers."""
    made = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        is_text = index == 0 or column in left
        made.add_column(Text(column), justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return made


def add_row(made: Table, *cells: str) -> None:
    """Add text as it is: a '[' in a name is no markup."""
    made.add_row(*(Text(cell) for cell in cells))


def common_place(uris: Sequence[str]) -> str:
    """What all these URIs begin with, up to a '/', so that it need be said only once; '' for none."""
    parts = [uri.split("/")[:-1] for uri in uris]
    shared = list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))
    return "".join(f"{column[0]}/" for column in shared)


def plan_view(planned: Plan) -> View:
    """The plan as tables."""
    parts: View = []
    for section in sections(planned):
        if not any(section.columns):
            parts.append(facts(dict(row for row in section.rows if len(row) == 2)))
            continue
        made = table(*section.columns, title=section.title, left=("learning rate", "order of products"))
        for row in section.rows:
            add_row(made, *row)
        parts.extend([BLANK, made])
    return parts


def facts(values: dict[str, str]) -> Text:
    """Names and values, one a line; long values are left whole, to be copied."""
    width = max(map(len, values))
    return Text("\n").join(Text.assemble((f"{name:<{width}}", "bold"), f"  {value}") for name, value in values.items())


def show(console: Console, view: Sequence[RenderableType]) -> None:
    """Print the parts of a view. Lines of text are wrapped by nobody but the terminal: a URI can be copied."""
    for part in view:
        console.print(part, soft_wrap=isinstance(part, Text), highlight=False)


def runs_view(runs: Sequence[RunInfo]) -> View:
    """Every run of a store."""
    made = table("run", "profile", "checkpoints", "latest step", "last commit", left=("profile",))
    for run in runs:
        counts = (str(run.checkpoint_count), f"{run.latest_step:,}", moment(run.modified_at))
        add_row(made, run.run_id, run.profile or "damaged", *counts)
    return [made]


def checkpoints_view(refs: Sequence[CheckpointRef], line: Sequence[CheckpointRef]) -> View:
    """The checkpoints of a run; those on its line are marked."""
    place, on_line = common_place([ref.uri for ref in refs]), {ref.uri for ref in line}
    headline = _headline(refs)
    made = table(
        "", "stage", "step", "tokens", headline.short, "size", "committed", "checkpoint", left=("stage", "checkpoint")
    )
    for ref in refs:
        manifest = ref.manifest
        add_row(
            made,
            "●" if ref.uri in on_line else " ",
            manifest.stage,
            f"{ref.step:,}",
            f"{manifest.tokens_seen:,}",
            headline.text(manifest.evaluation.get(headline.key)),
            size(manifest.size_bytes),
            moment(manifest.created_at),
            ref.uri.removeprefix(place),
        )
    where = Text(f"Below {place}" if place else "")
    legend = "● the run's line" if line else "No one line is the run's: name a checkpoint by its URI."
    return [where, made, Text(legend, style="dim")]


def checkpoint_view(ref: CheckpointRef, line: Sequence[CheckpointRef]) -> View:
    """All that a checkpoint's manifest says."""
    manifest = ref.manifest
    measures = measures_in(manifest.evaluation)
    about = facts(
        {
            "checkpoint": ref.uri,
            "run, stage": f"{manifest.run_id}, {manifest.stage} of profile {manifest.profile}",
            "step": f"{ref.step:,} ({manifest.cycle} merges, {manifest.tokens_seen:,} tokens)",
            **{m.name: m.change(manifest.evaluation) for m in (measures.headline, measures.second)},
            "committed": f"{moment(manifest.created_at)}, after {duration(manifest.stage_seconds)} of work",
            "fingerprint": manifest.fingerprint,
            **_variant(ref),
            "dataset": manifest.dataset_uri,
            "made by": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())) or "–",
            **{name.replace("_", " "): value for name, value in sorted(manifest.provenance.items())},
        }
    )
    merge = [BLANK, *_merge(manifest.merge_report)] if manifest.merge_report else []
    return [about, BLANK, _lineage(ref, line), BLANK, _files(ref), *merge]


def _variant(ref: CheckpointRef) -> dict[str, str]:
    manifest = ref.manifest
    lines = {"in place of": manifest.variant_of} if manifest.variant_of else {}
    return lines | ({"divergence": divergence_text(manifest.divergence)} if manifest.divergence else {})


def evaluation_view(record: dict[str, Any], *, reused: bool) -> View:
    """Scores and samples of one checkpoint."""
    measures = measures_in(record)
    about = facts(
        {
            "checkpoint": str(record["checkpoint_uri"]),
            **{m.name: m.text(record[m.key]) for m in (measures.headline, measures.second, LOSS)},
            f"{measures.unit}s scored": f"{record[measures.scored]:,}" + (" (recorded before)" if reused else ""),
        }
    )
    return [about, BLANK, *samples_lines(record)]


def samples_lines(record: dict[str, Any]) -> list[RenderableType]:
    """A record's samples, each shortened to a few lines; the prompt is underlined."""
    lines: list[RenderableType] = []
    for sample in record.get("samples", ()):
        text = str(sample["text"])
        shown = text if len(text) <= _SAMPLE_CHARACTERS else f"{text[:_SAMPLE_CHARACTERS]}…"
        line = Text.assemble((printable(str(sample["prompt"])), "underline"), printable(shown.rstrip()))
        lines.append(Padding(line, (0, 0, 0, 4)))
    return lines


def printable(text: str) -> str:
    """Text a model wrote, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "�" for c in text)


def _headline(refs: Sequence[CheckpointRef]) -> Measure:
    """What a table of one run's checkpoints shows of their scores."""
    return measures_in(refs[-1].manifest.evaluation if refs else {}).headline


def _lineage(ref: CheckpointRef, line: Sequence[CheckpointRef]) -> RenderableType:
    headline = _headline(line)
    made = table("stage", "step", headline.short, "checkpoint", title="Line that led here", left=("checkpoint",))
    parent = line[0].manifest.parent
    if parent is not None:
        add_row(made, "(gone)", f"{parent.step:,}", "–", parent.uri)
    for one in line:
        score = headline.text(one.manifest.evaluation.get(headline.key))
        add_row(made, one.manifest.stage, f"{one.step:,}", score, one.uri.removeprefix(f"{ref.store_uri}/"))
    return made


def _files(ref: CheckpointRef) -> RenderableType:
    made = table("file", "size", "SHA-256", title=f"Files, {size(ref.manifest.size_bytes)}", left=("SHA-256",))
    for entry in ref.manifest.files:
        add_row(made, entry.path, size(entry.size_bytes), entry.sha256[:16])
    return made


def _merge(report: dict[str, Any]) -> View:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, layer in report.get("layers", {}).items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(layer)
    made = table("merge", "layers", "mean ‖ΔW‖/‖W‖", "mean effective rank")
    for kind, layers in kinds.items():
        add_row(made, kind, str(len(layers)), *(_mean(layers, key, digits) for key, digits in _MERGE_NUMBERS))
    overall = ", ".join(f"{key.replace('_', ' ')} {decimal(report.get(key), digits)}" for key, digits in _MERGE_NUMBERS)
    change, zeroed = report.get("max_relative_output_change"), report.get("optimizer_state_zeroed")
    changed = (
        f"The model's output changed by {'–' if change is None else f'{change:.1e}'} at most, relative to its size"
    )
    forgot = f"{'–' if zeroed is None else f'{zeroed:.1%}'} of the optimizer state of A and B was zeroed"
    return [made, Text(f"Over all layers: {overall}."), Text(f"{changed}; {forgot}.")]


def _mean(layers: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    values = [layer[key] for layer in layers if layer.get(key) is not None]
    return decimal(sum(values) / len(values) if values else None, digits)
