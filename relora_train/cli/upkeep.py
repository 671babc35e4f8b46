"""`relora prune`, `verify` and `pin`: commands that look after what a store holds."""

import re
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated

import typer
from rich.text import Text

from relora_train.checkpoints import pins
from relora_train.checkpoints.layout import RUN_ID_PATTERN
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.checkpoints.upkeep.pruning import prune_run
from relora_train.checkpoints.upkeep.retention import RetentionPolicy, policy_of_run
from relora_train.checkpoints.upkeep.verify import verify_checkpoint, verify_run
from relora_train.cli.options import AsJson, CheckpointName, RunName, Store, answer, complete_run, open_named, resolve
from relora_train.cli.output import BLANK, View, say, table
from relora_train.errors import CheckpointError
from relora_train.text import counted, size


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
    opened = open_named(store)
    given = keep_last is not None or keep_every is not None
    policy = RetentionPolicy(keep_last, keep_every) if given else policy_of_run(opened, run)
    report = prune_run(opened, run, policy, grace=timedelta(hours=grace_hours), dry_run=dry_run)
    record = {
        "run_id": report.run_id,
        "dry_run": report.dry_run,
        "removed_bytes": report.removed_bytes,
        "checkpoints": [
            {
                "uri": verdict.checkpoint.uri,
                "stage": verdict.checkpoint.manifest.stage,
                "step": verdict.checkpoint.step,
                "size_bytes": verdict.checkpoint.manifest.size_bytes,
                "keep": verdict.keep,
                "reasons": verdict.reasons,
            }
            for verdict in report.verdicts
        ],
        "leftovers": [vars(left) for left in report.leftovers],
        "notes": report.notes,
    }
    word, verb = ("would go", "would be removed") if report.dry_run else ("gone", "removed")
    rows = []
    for verdict in report.verdicts:
        manifest = verdict.checkpoint.manifest
        fate = ("stays", "; ".join(verdict.reasons)) if verdict.keep else (word, "")
        rows.append((manifest.stage, f"{manifest.step:,}", size(manifest.size_bytes), *fate))
    made = table(("checkpoint", "step", "bytes", "", "why"), rows, left=("", "why"))
    lines = [
        f"{word}: {left.uri}, {left.why}, {counted(left.object_count, 'object')}, {size(left.size_bytes)}"
        for left in report.leftovers
    ]
    lines += [f"Later: {note}." for note in report.notes]
    total = f"{counted(len(report.removed), 'checkpoint')} {verb}, with leftovers {size(report.removed_bytes)}"
    lines.append(f"{total} ({report.removed_bytes:,} bytes).")
    view: View = [Text(f"Run {report.run_id}"), made, BLANK, *map(Text, lines)]
    answer(as_json, record, lambda: view)


def verify(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT", help="A run id, or any name of a checkpoint.", autocompletion=complete_run
        ),
    ],
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte again and name what is missing, damaged or unreferenced; exit code 0 only for nothing."""
    opened = open_named(store)
    is_run = re.fullmatch(RUN_ID_PATTERN, name) and any(True for _ in opened.list(f"runs/{name}/"))
    found = verify_run(opened, name) if is_run else verify_checkpoint(resolve_checkpoint(name, opened))
    parts: View = [Text.assemble((each.kind, "bold red"), f"  {each.uri}: {each.message}") for each in found.findings]
    parts += [Text(f"Note: {note}.") for note in found.notes]
    counts = Counter(each.kind for each in found.findings)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("missing", "damaged", "unreferenced") if counts[kind])
    verdict = "all as committed, nothing missing, nothing left over" if found.is_clean else told
    files, bundles = counted(found.files, "file"), counted(found.bundles, "bundle")
    total = Text(f"{files} in {bundles}, {size(found.size_bytes)}, read again: {verdict}.")
    answer(as_json, {"clean": found.is_clean, **asdict(found)}, lambda: [*parts, total])
    if not found.is_clean:
        raise typer.Exit(CheckpointError.exit_code)


def pin(
    checkpoint: CheckpointName,
    name: Annotated[str | None, typer.Option(help="Name of the pin; made from the checkpoint's when absent.")] = None,
    remove: Annotated[
        bool,
        typer.Option(
            "--remove",
            help="Remove its pins and export marks, or that of --name; then a run's id finds the checkpoint too.",
        ),
    ] = False,
    store: Store = None,
) -> None:
    """Keep a checkpoint from every prune until the pin is removed."""
    if not remove:
        ref = resolve(checkpoint, store)
        say(f"{ref.uri} is pinned as {pins.pin(open_named(ref.store_uri), ref, name)}.")
        return
    is_run = name is not None and re.fullmatch(RUN_ID_PATTERN, checkpoint)
    found = pins.find_pinned(open_named(store), checkpoint, name) if is_run and name else None
    ref = found or resolve(checkpoint, store)
    removed = pins.unpin(open_named(ref.store_uri), ref, name)
    say(f"{ref.uri} is no longer pinned as {', '.join(removed)}.")
