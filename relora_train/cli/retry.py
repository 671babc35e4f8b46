"""`relora retry`: make one stage again and say what becomes of what rests on it. Imports no torch, no Prefect."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from relora_train import events
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.cli.progress import shown_progress
from relora_train.cli.tables import View
from relora_train.runs.retry import RetryOutcome, retry_stage
from relora_train.settings.objectives import measures_in


def retry_checkpoint(checkpoint: CheckpointRef, console: Console, *, replace: bool) -> RetryOutcome:
    """Retry a checkpoint's stage under a progress display."""
    stage = checkpoint.manifest.stage
    with shown_progress(console, [stage], first=f"training {stage} of {checkpoint.manifest.run_id} once more"):
        return retry_stage(checkpoint, on_event=lambda event: events.emit(**event), replace=replace)


def retry_view(outcome: RetryOutcome) -> View:
    """The verdict, and what follows from it."""
    return [Text("\n").join(map(Text, _sentences(outcome)))]


def retry_record(outcome: RetryOutcome) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "checkpoint_uri": outcome.checkpoint.uri,
        "identical": outcome.identical,
        "differing_files": list(outcome.differing_files),
        "evaluation": outcome.evaluation,
        "descendant_uris": [ref.uri for ref in outcome.descendants],
        "replacement_uri": outcome.replacement.uri if outcome.replacement else None,
    }


def _sentences(outcome: RetryOutcome) -> list[str]:
    ref, manifest = outcome.checkpoint, outcome.checkpoint.manifest
    name, below = f"{manifest.run_id}@{manifest.stage}", outcome.descendants
    if outcome.identical:
        kept = f" What was trained from it ({len(below)}) stays valid." if below else ""
        return [f"{name} came out identical, byte for byte: nothing changes.{kept}"]
    headline = measures_in(manifest.evaluation).headline
    scores = headline.arrow(manifest.evaluation.get(headline.key), outcome.evaluation.get(headline.key))
    lines = [
        f"{name} came out otherwise: {', '.join(outcome.differing_files)}.",
        f"Validation {headline.name}, committed → new: {scores}.",
    ]
    names = "".join(f"\n  {one.manifest.run_id}@{one.manifest.stage}: {one.uri}" for one in below)
    if outcome.replacement is None:
        again = "; --replace makes the run go on from a new attempt"
        lines.append(f"The committed checkpoint stays the run's, and the new attempt was dropped{again}.")
        lines += [f"Still resting on it:{names}"] if below else []
        return lines
    lines += [
        f"The run goes on from {outcome.replacement.uri}.",
        f"The checkpoint it replaces is kept off the run's line: {ref.uri}",
    ]
    if below:
        lines.append(f"So is what was trained from that one; the run's own command makes its stages again:{names}")
    return lines
