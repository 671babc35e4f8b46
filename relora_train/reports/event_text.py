"""The events of a run as lines for people: in the terminal, in Prefect's log and in its artifacts. Light."""

from __future__ import annotations

from relora_train.events import Event
from relora_train.settings.objectives import measures_in
from relora_train.text import MISSING, count, duration


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
            size = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB" if total else f"{done / 1e6:,.1f} MB"
            return f"{size}  {speed:,.1f} MB/s" if speed else size
        case "dataset_ready":
            size = f"{event['train_tokens']:,} {event.get('unit', 'tokens')} to train on, {event['val_tokens']:,}"
            return f"{'reused ' if event['reused'] else ''}dataset {event['name']}: {size} to validate on"
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
