"""A stage, its checkpoint and its merge as Markdown and tables, for the orchestrator's UI. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from relora_train.runs.divergence import divergence_text
from relora_train.settings.objectives import measures_in
from relora_train.text import count, duration, percent, scientific, size, steps_text

if TYPE_CHECKING:
    from relora_train.checkpoints.lineage import CheckpointRef
    from relora_train.method.stages import Stage
    from relora_train.runs.run import StageOutcome

Layers = Mapping[str, Mapping[str, float]]


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


def merge_table(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the merge report of a manifest as rows: all layers together, each kind of layer, each layer.

    The rows have the same keys, with '' where a number is known of all layers only. ∇A and ∇B are the largest gradient
    norms of the cycle's first steps. Norms of several layers are of all their weights together; their effective rank
    is the mean.
    """
    layers: Layers = report.get("layers", {})
    shown = {name: name.removesuffix(".weight").removeprefix("model.") for name in layers}
    kinds = {name: module.rpartition(".")[2] for name, module in shown.items()}  # 'q_proj'
    rows = [_row("all layers", layers, report)]
    if len(set(kinds.values())) > 1:
        for kind in dict.fromkeys(kinds.values()):
            of_kind = {name: layer for name, layer in layers.items() if kinds[name] == kind}
            rows.append(_row(f"all {kind}", of_kind, {}))
    return rows + [_row(shown[name], {name: layer}, {}) for name, layer in layers.items()]


def _row(name: str, layers: Layers, whole: Mapping[str, Any]) -> dict[str, Any]:
    update, weight = (
        math.sqrt(sum(layer[key] ** 2 for layer in layers.values())) for key in ("update_norm", "weight_norm")
    )
    ranks = [layer["effective_rank"] for layer in layers.values()]
    numbers: dict[str, float | None] = {
        "‖ΔW‖ / ‖W‖": update / weight if weight else None,
        "‖ΔW‖": update,
        "effective rank": sum(ranks) / len(ranks) if ranks else None,
        "output change": whole.get("max_relative_output_change"),
        "Adam zeroed": whole.get("optimizer_state_zeroed"),
        "∇A": whole.get("first_lora_A_grad_norm"),
        "∇B": whole.get("first_lora_B_grad_norm"),
    }
    # As text, because a table of the UI shows floats with all their digits.
    return {"layer": name, **{key: "" if value is None else f"{value:.4g}" for key, value in numbers.items()}}
