"""The commands that look after what a store holds: prune, verify, pin, unpin. Imports no torch and no Prefect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.text import Text

from relora_train.checkpoints.layout import RUN_ID_PATTERN
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.checkpoints.upkeep.pruning import PruneReport, prune_run
from relora_train.checkpoints.upkeep.retention import RetentionPolicy
from relora_train.checkpoints.upkeep.retention_profile import policy_of_run
from relora_train.checkpoints.upkeep.verify import Verification, verify_checkpoint, verify_run
from relora_train.cli.tables import BLANK, View, add_row, table
from relora_train.storage.base import ObjectStore
from relora_train.text import size


def prune(
    store: ObjectStore,
    run_id: str,
    *,
    keep_last: int | None,
    keep_every: int | None,
    grace_hours: float,
    dry_run: bool,
) -> PruneReport:
    """Prune by the given policy, else by the one in the profile of the run's latest checkpoint."""
    if keep_last is None and keep_every is None:
        policy = policy_of_run(store, run_id)
    else:
        policy = RetentionPolicy(keep_last, keep_every)
    return prune_run(store, run_id, policy, grace=timedelta(hours=grace_hours), dry_run=dry_run)


def prune_view(report: PruneReport) -> View:
    """What goes, what stays and why."""
    word = "would go" if report.dry_run else "gone"
    made = table("checkpoint", "step", "bytes", "", "why", left=("", "why"))
    for verdict in report.verdicts:
        manifest = verdict.checkpoint.manifest
        fate, why = ("stays", "; ".join(verdict.reasons)) if verdict.keep else (word, "")
        add_row(made, manifest.stage, f"{manifest.step:,}", size(manifest.size_bytes), fate, why)
    parts: View = [Text(f"Run {report.run_id}"), made, BLANK]
    parts += [
        Text(f"{word}: {left.uri}, {left.why}, {left.object_count} objects, {size(left.size_bytes)}")
        for left in report.leftovers
    ]
    parts += [Text(f"Later: {note}.") for note in report.notes]
    verb = "would be removed" if report.dry_run else "removed"
    total = f"{len(report.removed)} checkpoints {verb}, with leftovers {size(report.removed_bytes)}"
    return [*parts, Text(f"{total} ({report.removed_bytes:,} bytes).")]


def prune_json(report: PruneReport) -> dict[str, Any]:
    return {
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


def verify(store: ObjectStore, name: str) -> Verification:
    """A run by its id, else one checkpoint by any of its names."""
    if re.fullmatch(RUN_ID_PATTERN, name) and any(True for _ in store.list(f"runs/{name}/")):
        return verify_run(store, name)
    return verify_checkpoint(resolve_checkpoint(name, store))


def verify_view(found: Verification) -> View:
    parts: View = [Text.assemble((each.kind, "bold red"), f"  {each.uri}: {each.message}") for each in found.findings]
    parts += [Text(f"Note: {note}.") for note in found.notes]
    read = f"{found.files} files in {found.bundles} bundles, {size(found.size_bytes)}, read again"
    return [*parts, Text(f"{read}: {_verdict(found)}.")]


def _verdict(found: Verification) -> str:
    if found.is_clean:
        return "all as committed, nothing missing, nothing left over"
    kinds: Sequence[str] = ("missing", "damaged", "unreferenced")
    counts = {kind: sum(each.kind == kind for each in found.findings) for kind in kinds}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
