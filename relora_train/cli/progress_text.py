"""Events of a run as lines for people. Pure functions; light. The one place where their wording is chosen."""

from __future__ import annotations

from relora_train.events import Event
from relora_train.settings.objectives import measures_in
from relora_train.text import duration


def progress_line(event: Event, *, short: bool = False) -> str:
    """'40/60  loss 5.123  lr 4.0e-03  12,345 tokens/s  8 s left'; `short` fits half a terminal."""
    parts = [f"{event['step']:,}/{event['end_step']:,}", f"loss {event['loss']:.3f}"]
    if not short:
        parts.append(f"lr {event['learning_rate']:.1e}")
    parts.append(f"{_thousands(event['tokens_per_second'])} tok/s")
    parts.append(f"{duration(event['eta_seconds'])} left")
    return "  ".join(parts)


def tokenize_line(event: Event) -> str:
    """'12.3 of 45.6 MB  4.5 MB/s'."""
    done, total, speed = event.get("done_bytes") or 0, event.get("total_bytes"), event.get("megabytes_per_second")
    size = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB" if total else f"{done / 1e6:,.1f} MB"
    return f"{size}  {speed:,.1f} MB/s" if speed else size


def dataset_line(event: Event) -> str:
    unit = event.get("unit", "tokens")
    size = f"{event['train_tokens']:,} {unit} to train on, {event['val_tokens']:,} to validate on"
    return f"{'reused ' if event['reused'] else ''}dataset {event['name']}: {size}"


def stage_started_line(event: Event) -> str:
    ranks = f" x {event['ranks']}" if event.get("ranks", 1) > 1 else ""
    trained, parameters = event["trainable_parameters"], event["parameters"]
    share = f"all {parameters:,} parameters" if trained == parameters else f"{trained:,} of {parameters:,} parameters"
    steps = f"steps {event['start_step'] + 1:,} to {event['end_step']:,}"
    return f"{event['stage']}: {steps} on {event['device']}{ranks}, {share} trained"


def resumed_line(event: Event) -> str:
    """'cycle-1: going on from the snapshot of step 240'."""
    return f"{event['stage']}: going on from the snapshot of step {event['step']:,}"


def merge_line(event: Event) -> str:
    """Within 100 columns: the check that nothing changed, the size of the update, what Adam forgot of A and B."""
    return (
        f"merged cycle {event['cycle']}: output changed {_number(event, 'max_relative_output_change', '.0e')}, "
        f"‖ΔW‖/‖W‖ {_number(event, 'relative_update_norm', '.3f')}, "
        f"effective rank {_number(event, 'effective_rank', '.1f')}, "
        f"{_number(event, 'optimizer_state_zeroed', '.1%')} of Adam zeroed"
    )


def stage_finished_line(event: Event, before: float | None) -> str:
    """'cycle-1: validation perplexity 120.41 → 98.33 in 4.2 s'."""
    headline = measures_in(event).headline
    return f"{event['stage']}: validation {headline.name} {headline.arrow(before, event.get(headline.key))}" + (
        f" in {duration(event['seconds'])}" if event.get("seconds") else ""
    )


def arm_started_line(event: Event) -> str:
    """'relora, seed 0: run tiny-relora-s0-1a2b3c4d'."""
    return f"{event['arm']}, seed {event['seed']}: run {event['run_id']}"


def arm_reused_line(event: Event) -> str:
    """'reused relora, seed 0: validation perplexity 98.33'."""
    headline = measures_in(event).headline
    scored = f"validation {headline.name} {headline.text(event[headline.key])}"
    result = "diverged" if event["outcome"] == "diverged" else scored
    return f"reused {event['arm']}, seed {event['seed']}: {result}"


def arm_diverged_line(event: Event) -> str:
    """'restarts-reset, seed 0 diverged: The training loss is nan at step 83 …'."""
    return f"{event['arm']}, seed {event['seed']} diverged: {event['message'].partition(': ')[0]}"


def diverged_line(event: Event) -> str:
    """'cycle-2 diverged at learning rate 0.001 (attempt 1 of 3)'; what follows shows whether another is made."""
    return (
        f"{event['stage']} diverged at learning rate {event['learning_rate']:.3g} "
        f"(attempt {event['attempt']} of {event['attempts']})"
    )


def stage_skipped_line(event: Event) -> str:
    headline = measures_in(event).headline
    value = event.get(headline.key)
    scored = f", validation {headline.name} {headline.text(value)}" if value is not None else ""
    return f"reused {event['stage']}: step {event['step']:,}{scored}"


def evaluated_line(event: Event) -> str:
    done = "reused evaluation of" if event["reused"] else "evaluated"
    headline, second = measures_in(event).headline, measures_in(event).second
    scores = f"validation {headline.name} {headline.text(event[headline.key])}"
    return f"{done} {event['stage']}: {scores}, {second.name} {second.text(event[second.key])}"


def _number(event: Event, key: str, form: str) -> str:
    value = event.get(key)
    return "–" if value is None else format(value, form)


def _thousands(number: float) -> str:
    return f"{number:,.0f}" if number < 1e5 else f"{number / 1e3:,.0f}k"
