"""`relora checkpoints` and `relora show`: the checkpoints of a run, and all that is known of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from relora_train.checkpoints.fetch import verify_bundle
from relora_train.checkpoints.lineage import CheckpointRef, draw_lineage, line_to
from relora_train.checkpoints.names import read_checkpoints, read_heads, resolve_checkpoint
from relora_train.checkpoints.run import CheckpointStore
from relora_train.cli.lineage_view import lineage_record, lineage_view
from relora_train.cli.options import AsJson, CheckpointName, RunName, Store, answer, open_named, resolve
from relora_train.cli.output import complain
from relora_train.cli.tables import BLANK, View, add_row, common_place, facts, table
from relora_train.errors import CheckpointAmbiguousError, CheckpointCorruptError, CheckpointError
from relora_train.runs.divergence import divergence_text
from relora_train.runs.run import line_of
from relora_train.settings.measures import Measure
from relora_train.settings.objectives import measures_in
from relora_train.text import decimal, duration, moment, size

_MERGE_NUMBERS = (("relative_update_norm", 4), ("effective_rank", 1))


def checkpoints(run: RunName, store: Store = None, as_json: AsJson = False) -> None:
    """List the committed checkpoints of a run."""
    held = CheckpointStore(open_named(store), run)
    refs, faults = held.survey()
    if not refs and not faults:
        resolve_checkpoint(f"{run}@latest", held.store)  # raises what is to be said of a run without checkpoints
    try:
        latest = held.latest()
    except (CheckpointAmbiguousError, CheckpointCorruptError):
        latest = None
    line = line_to(latest, refs) if latest else ()
    answer(
        as_json,
        record=lambda: [{**_record(ref), "on_line": ref in line} for ref in refs],
        view=lambda: checkpoints_view(refs, line),
    )
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
    ref = resolve(checkpoint, store)
    opened = open_named(ref.store_uri)
    if verify:
        verify_bundle(opened, ref.prefix, ref.manifest)
    line = line_of(ref)
    known = [*read_checkpoints(opened), *line]
    heads = read_heads(opened, known)
    roots = [
        root
        for root in draw_lineage(known, heads)
        if any(ref.uri == one.uri for part in root.all_lines() for one in part.checkpoints)
    ]
    lineage = [{"stage": one.manifest.stage, "step": one.step, "uri": one.uri} for one in line]
    verified = [Text("Every file is as its manifest says.")] if verify else []
    tree = [BLANK, Text("Runs it belongs with", style="bold"), *lineage_view(roots, heads, marked=ref.uri)]
    answer(
        as_json,
        record=lambda: {**_record(ref), "lineage": lineage, "tree": lineage_record(roots[0]), "verified": verify},
        view=lambda: [*checkpoint_view(ref, line), *(tree if roots[0].branches else []), *verified],
    )


def _record(ref: CheckpointRef) -> dict[str, Any]:
    return {"uri": ref.uri, **ref.manifest.model_dump(mode="json")}


def checkpoints_view(refs: Sequence[CheckpointRef], line: Sequence[CheckpointRef]) -> View:
    """Return the checkpoints of a run; those on its line are marked."""
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
    """Return everything that a checkpoint's manifest says."""
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
            **({"in place of": manifest.variant_of} if manifest.variant_of else {}),
            **({"divergence": divergence_text(manifest.divergence)} if manifest.divergence else {}),
            "dataset": manifest.dataset_uri,
            "made by": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())) or "–",
            **{name.replace("_", " "): value for name, value in sorted(manifest.provenance.items())},
        }
    )
    merge = [BLANK, *_merge(manifest.merge_report)] if manifest.merge_report else []
    return [about, BLANK, _lineage(ref, line), BLANK, _files(ref), *merge]


def _headline(refs: Sequence[CheckpointRef]) -> Measure:
    """Return the score that a table of one run's checkpoints shows."""
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
