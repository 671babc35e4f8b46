"""A stage and its checkpoint as short Markdown, for the orchestrator's UI. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relora_train.runs.divergence import divergence_text
from relora_train.settings.objectives import measures_in
from relora_train.text import count, duration, percent, scientific, size, steps_text

if TYPE_CHECKING:
    from relora_train.checkpoints.lineage import CheckpointRef
    from relora_train.method.stages import Stage
    from relora_train.runs.run import StageOutcome


def finished_text(stage: Stage, outcome: StageOutcome) -> str:
    """Return 'cycle-2: steps 201–400 done in 20 s, …', or that it was there already."""
    manifest = outcome.checkpoint.manifest
    headline = measures_in(manifest.evaluation).headline
    what = f"**{stage.name}**: steps {steps_text(stage.start_step, stage.end_step)}"
    if outcome.reused:
        state = "was there and has been pruned" if outcome.checkpoint.is_pruned else "is there already"
        return f"{what} skipped, the checkpoint {state}: `{outcome.checkpoint.uri}`"
    scored = f"validation {headline.name} {headline.change(manifest.evaluation)}"
    waits = "" if outcome.stored else "; its checkpoint is being stored"
    return f"{what} done in {duration(manifest.stage_seconds)}, {scored}{waits}"


def checkpoint_markdown(ref: CheckpointRef) -> str:
    """Return a committed checkpoint's place and score, and how to branch from it."""
    manifest = ref.manifest
    headline = measures_in(manifest.evaluation).headline
    rows = {
        "Step": count(manifest.step),
        "Tokens seen": count(manifest.tokens_seen),
        f"Validation {headline.name}": headline.change(manifest.evaluation),
        "Size": size(manifest.size_bytes),
        "Parent": f"`{manifest.parent.uri}`" if manifest.parent else "none: the run's first stage",
        "Dataset": f"`{manifest.dataset_uri}`",
        "Fingerprint": f"`{manifest.fingerprint}`",
    }
    if manifest.divergence:
        rows["Note"] = divergence_text(manifest.divergence)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"## {manifest.run_id}@{manifest.stage}\n\n| Checkpoint | `{ref.uri}` |\n|:--|:--|\n{table}\n\n"
        f"To branch from here: the flow's parameter `resume_from`, or\n\n"
        f"```\nrelora run PROFILE --resume-from {ref.uri}\n```\n"
    )


def merge_text(ref: CheckpointRef) -> str:
    """Return the effect of the merge behind a checkpoint in one line."""
    manifest, report = ref.manifest, ref.manifest.merge_report
    return (
        f"**{manifest.run_id}, {manifest.stage}, merged at step {count(manifest.step)}**: output changed by "
        f"{scientific(report.get('max_relative_output_change'))} of the largest logit, "
        f"{percent(report.get('optimizer_state_zeroed'))} of the Adam state of A and B zeroed"
    )
