"""`relora show`: the checkpoints of a run, or all that is known of one."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train.checkpoints.fetch import verify_bundle
from relora_train.checkpoints.layout import RUN_ID_PATTERN
from relora_train.checkpoints.lineage import draw_lineage, line_to
from relora_train.checkpoints.names import read_checkpoints, read_heads, resolve_checkpoint
from relora_train.checkpoints.run import CheckpointStore
from relora_train.cli.options import AsJson, Store, answer, complete_run, open_named, resolve
from relora_train.cli.output import BLANK, View, common_place, complain, facts, table, task_table
from relora_train.cli.runs import lineage_record, lineage_view
from relora_train.errors import CheckpointAmbiguousError, CheckpointCorruptError, CheckpointError, ConfigError
from relora_train.runs.divergence import divergence_text
from relora_train.runs.run import line_of
from relora_train.runs.task_scores import recorded_task_scores
from relora_train.settings.objectives import measures_in
from relora_train.storage.base import ObjectStore
from relora_train.text import counted, decimal, duration, moment, size

_MERGE_NUMBERS = (("relative_update_norm", 4), ("effective_rank", 1))


def _show_run(opened: ObjectStore, run: str, *, as_json: bool) -> None:
    """List the committed checkpoints of a run."""
    held = CheckpointStore(opened, run)
    refs, faults = held.survey()
    if not refs and not faults:
        resolve_checkpoint(f"{run}@latest", held.store)  # raises what is to be said of a run without checkpoints
    try:
        latest = held.latest()
    except (CheckpointAmbiguousError, CheckpointCorruptError):
        latest = None
    line = line_to(latest, refs) if latest else ()
    place, on_line = common_place([ref.uri for ref in refs]), {ref.uri for ref in line}
    headline = measures_in(refs[-1].manifest.evaluation if refs else {}).headline
    columns = ("", "stage", "step", "tokens", headline.short, "size", "committed", "checkpoint")
    rows = [
        (
            "●" if ref.uri in on_line else " ",
            ref.manifest.stage,
            f"{ref.step:,}",
            f"{ref.manifest.tokens_seen:,}",
            headline.text(ref.manifest.evaluation.get(headline.key)),
            size(ref.manifest.size_bytes),
            moment(ref.manifest.created_at),
            ref.uri.removeprefix(place),
        )
        for ref in refs
    ]
    legend = "● the run's line" if line else "No one line is the run's: name a checkpoint by its URI."
    made = table(columns, rows, left=("stage", "checkpoint"))
    record = [{"uri": ref.uri, **ref.manifest.model_dump(mode="json"), "on_line": ref in line} for ref in refs]
    answer(as_json, record, lambda: [Text(f"Below {place}" if place else ""), made, Text(legend, style="dim")])
    for fault in faults:
        complain(str(fault))
    if faults:
        raise typer.Exit(CheckpointError.exit_code)


def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT",
            help="A run id, or RUN@latest or any other name of a checkpoint.",
            autocompletion=complete_run,
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte of a checkpoint and check it first.")
    ] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the committed checkpoints of a run, or show all that is known of one: scores, lineage, files, merge."""
    if re.fullmatch(RUN_ID_PATTERN, name) and not Path(name).is_dir():
        if verify:
            raise ConfigError(
                f"--verify reads one checkpoint: {name}@latest. `relora verify {name}` reads the whole run."
            )
        _show_run(open_named(store), name, as_json=as_json)
        return
    ref = resolve(name, store)
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
    more = {"lineage": lineage, "tree": lineage_record(roots[0]), "verified": verify}
    more["task_scores"] = task_scores = recorded_task_scores(opened, [ref])
    manifest = ref.manifest
    measures = measures_in(manifest.evaluation)
    about = facts(
        {
            "checkpoint": ref.uri,
            "run, stage": f"{manifest.run_id}, {manifest.stage} of profile {manifest.profile}",
            "step": f"{ref.step:,} ({counted(manifest.cycle, 'merge')}, {manifest.tokens_seen:,} tokens)",
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
    headline, parent = measures_in(line[-1].manifest.evaluation).headline, line[0].manifest.parent
    led_here = [("(gone)", f"{parent.step:,}", "–", parent.uri)] if parent else []
    for one in line:
        score = headline.text(one.manifest.evaluation.get(headline.key))
        led_here.append((one.manifest.stage, f"{one.step:,}", score, one.uri.removeprefix(f"{ref.store_uri}/")))
    columns = ("stage", "step", headline.short, "checkpoint")
    files = [(entry.path, size(entry.size_bytes), entry.sha256[:16]) for entry in manifest.files]
    parts: View = [about, BLANK, table(columns, led_here, title="Line that led here", left=("checkpoint",)), BLANK]
    parts.append(
        table(("file", "size", "SHA-256"), files, title=f"Files, {size(manifest.size_bytes)}", left=("SHA-256",))
    )
    if manifest.merge_report:
        parts += [BLANK, *_merge(manifest.merge_report)]
    if task_scores:
        parts += [BLANK, task_table(task_scores, title="Scores by tasks")]
    parts += [*(tree if roots[0].branches else []), *verified]
    answer(as_json, {"uri": ref.uri, **manifest.model_dump(mode="json"), **more}, lambda: parts)


def _merge(report: dict[str, Any]) -> View:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, layer in report.get("layers", {}).items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(layer)

    def mean(layers: Sequence[dict[str, Any]], key: str, digits: int) -> str:
        values = [layer[key] for layer in layers if layer.get(key) is not None]
        return decimal(sum(values) / len(values) if values else None, digits)

    rows = [
        (kind, str(len(layers)), *(mean(layers, key, digits) for key, digits in _MERGE_NUMBERS))
        for kind, layers in kinds.items()
    ]
    overall = ", ".join(f"{key.replace('_', ' ')} {decimal(report.get(key), digits)}" for key, digits in _MERGE_NUMBERS)
    change, zeroed = report.get("max_relative_output_change"), report.get("optimizer_state_zeroed")
    changed = (
        f"The model's output changed by {'–' if change is None else f'{change:.1e}'} at most, relative to its size"
    )
    forgot = f"{'–' if zeroed is None else f'{zeroed:.1%}'} of the optimizer state of A and B was zeroed"
    columns = ("merge", "layers", "mean ‖ΔW‖/‖W‖", "mean effective rank")
    return [table(columns, rows), Text(f"Over all layers: {overall}."), Text(f"{changed}; {forgot}.")]
