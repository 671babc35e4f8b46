"""Events as lines for people, in the terminal and Prefect's log; a stage, its checkpoint and its merge as Markdown."""

import math
from collections.abc import Mapping
from typing import Any

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.events import Event
from relora_train.method.stages import Stage
from relora_train.runs.divergence import divergence_text
from relora_train.runs.run import StageOutcome
from relora_train.settings.objectives import measures_in
from relora_train.text import MISSING, count, duration, percent, scientific, size, steps_text

Layers = Mapping[str, Mapping[str, float]]


def event_line(event: Event, *, before: float | None = None, short: bool = False) -> str:
    """Return one line of at most about 100 columns.

    before: the score at the start of a stage that has finished. short: fits half a terminal.
    """
    stage, measures = event.get("stage"), measures_in(event)
    headline, second = measures.headline, measures.second
    score = event.get(headline.key)
    scored = f"validation {headline.name} {headline.text(score)}"
    match event["event"]:
        case "progress":
            rate = event["tokens_per_second"]
            tokens = count(rate) if rate < 1e5 else f"{count(rate / 1e3)}k"
            parts = [f"{event['step']:,}/{event['end_step']:,}", f"loss {event['loss']:.3f}"]
            parts += [] if short else [f"lr {event['learning_rate']:.1e}"]
            return "  ".join([*parts, f"{tokens} tok/s", f"{duration(event['eta_seconds'])} left"])
        case "tokenize_progress":
            done, total = event.get("done_bytes") or 0, event.get("total_bytes")
            speed = event.get("megabytes_per_second")
            read = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB" if total else f"{done / 1e6:,.1f} MB"
            return f"{read}  {speed:,.1f} MB/s" if speed else read
        case "dataset_ready":
            held = f"{event['train_tokens']:,} {event.get('unit', 'tokens')} to train on, {event['val_tokens']:,}"
            return f"{'reused ' if event['reused'] else ''}dataset {event['name']}: {held} to validate on"
        case "stage_started":
            ranks = f" x {event['ranks']}" if event.get("ranks", 1) > 1 else ""
            trained, parameters = event["trainable_parameters"], event["parameters"]
            share = "all " if trained == parameters else f"{trained:,} of "
            steps = f"steps {event['start_step'] + 1:,} to {event['end_step']:,}"
            return f"{stage}: {steps} on {event['device']}{ranks}, {share}{parameters:,} parameters trained"
        case "resumed":
            return f"{stage}: going on from the snapshot of step {event['step']:,}"
        case "evaluation" if "when" in event:
            return f"{event['when']} step {event['step']}: {scored}, {second.name} {second.text(event[second.key])}"
        case "merge":
            return (
                f"merged cycle {event['cycle']}: output changed {_number(event, 'max_relative_output_change', '.0e')}, "
                f"‖ΔW‖/‖W‖ {_number(event, 'relative_update_norm', '.3f')}, "
                f"effective rank {_number(event, 'effective_rank', '.1f')}, "
                f"{_number(event, 'optimizer_state_zeroed', '.1%')} of Adam zeroed"
            )
        case "stage_committed":
            return f"{stage}: trained and written at step {event['step']:,}, now stored"
        case "stage_finished":
            took = f" in {duration(event['seconds'])}" if event.get("seconds") else ""
            return f"{stage}: validation {headline.name} {headline.arrow(before, score)}{took}"
        case "stage_skipped":
            return f"reused {stage}: step {event['step']:,}" + (f", {scored}" if score is not None else "")
        case "evaluated":
            done = "reused evaluation of" if event["reused"] else "evaluated"
            return f"{done} {stage}: {scored}, {second.name} {second.text(event[second.key])}"
        case "diverged":
            attempt = f"attempt {event['attempt']} of {event['attempts']}"
            return f"{stage} diverged at learning rate {event['learning_rate']:.3g} ({attempt})"
        case "retrying":
            why = event["message"].strip().partition("\n")[0].partition(". ")[0].removesuffix(".")
            pause = f"in about {event['seconds']:.0f} s" if event["seconds"] else "immediately"
            return f"{event['task']} failed: {why}. Retry {event['retry']} of {event['retries']} {pause}."
        case "stopping":
            return f"asked the worker to finish its step, save its state and end within {event['seconds']:.0f} s"
        case "arm_started":
            return f"{event['arm']}, seed {event['seed']}: run {event['run_id']}"
        case "arm_reused":
            result = "diverged" if event["outcome"] == "diverged" else scored
            return f"reused {event['arm']}, seed {event['seed']}: {result}"
        case "arm_diverged":
            return f"{event['arm']}, seed {event['seed']} diverged: {event['message'].partition(': ')[0]}"
        case name:
            shown = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in event.items() if key != "event"}
            return f"{name}: " + ", ".join(f"{key}={value}" for key, value in shown.items())


def _number(event: Event, key: str, form: str) -> str:
    value = event.get(key)
    return MISSING if value is None else format(value, form)


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
    # Numbers as text, because a table of the UI shows floats with all their digits.
    return {"layer": name, **{key: "" if value is None else f"{value:.4g}" for key, value in numbers.items()}}
