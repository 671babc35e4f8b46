"""`relora retry`: make one stage again and say what becomes of what rests on it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train import events
from relora_train.cli.options import AsJson, CheckpointName, Store, answer, resolve
from relora_train.cli.output import console_for_people
from relora_train.cli.progress import shown_progress
from relora_train.cli.tables import View
from relora_train.runs.retry import RetryOutcome, retry_stage
from relora_train.settings.objectives import measures_in


def retry(
    checkpoint: CheckpointName,
    replace: Annotated[
        bool, typer.Option("--replace", help="If it comes out otherwise, let the run go on from the new attempt.")
    ] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint's stage again from its parent, compare the bytes, and say what becomes of its descendants."""
    ref = resolve(checkpoint, store)
    stage, console = ref.manifest.stage, console_for_people(to_stderr=as_json)
    with shown_progress(console, [stage], first=f"training {stage} of {ref.manifest.run_id} once more"):
        outcome = retry_stage(ref, on_event=lambda event: events.emit(**event), replace=replace)
    answer(as_json, record=lambda: retry_record(outcome), view=lambda: retry_view(outcome))


def retry_view(outcome: RetryOutcome) -> View:
    """Return the verdict, and what follows from it."""
    return [Text("\n").join(map(Text, _sentences(outcome)))]


def retry_record(outcome: RetryOutcome) -> dict[str, Any]:
    """Return the same as plain data."""
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
