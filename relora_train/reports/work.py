"""A stage's work by its checkpoint: attempts, machine, memory, speed; and its learning rate by the schedule."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from pydantic import ValidationError

from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.errors import ReLoRAError
from relora_train.method.schedule import learning_rate
from relora_train.method.stages import Stage, stages_after
from relora_train.reports.run_data import RateCurve, StageRow, StageWork, TrainCurve
from relora_train.runs.costs import full_cost, low_rank_cost
from relora_train.settings.profile import Profile, profile_to_read
from relora_train.text import MISSING, count, duration
from relora_train.training.models.registry import counted_shape

RATE_POINTS = 1500
"""Points of a run's learning rate, beside the corners of its curve."""

_PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12, "A40": 149.7e12, "A10": 125e12, "L4": 121e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s of a device whose name holds the key, the first that does; data sheets of NVIDIA."""


def profile_of(content: bytes) -> Profile | None:
    """Return the settings of a checkpoint's profile.json; None for those of a version with other keys."""
    try:
        return profile_to_read(content)
    except (ReLoRAError, ValidationError):
        return None


def stage_of(manifest: CheckpointManifest, parent: CheckpointManifest | None, profile: Profile) -> Stage | None:
    """Return the stage that made a checkpoint, as its own settings plan it; None if they do not tell."""
    if manifest.parent is not None and parent is None:
        return None
    try:
        (stage, *_) = stages_after(profile, parent) or [None]
    except ReLoRAError:
        return None
    return stage if stage is not None and (stage.name, stage.end_step) == (manifest.stage, manifest.step) else None


def stage_work(
    manifest: CheckpointManifest, records: Sequence[Mapping[str, Any]], profile: Profile | None
) -> StageWork:
    """Return what manifest, metrics and settings tell of a stage's work."""
    attempts = tuple(record for record in records if record.get("kind") == "attempt")
    ended = manifest.created_at.astimezone(UTC)
    began = ended - timedelta(seconds=manifest.stage_seconds)
    if attempts:
        began = min(began, datetime.fromisoformat(attempts[0]["at"]).astimezone(UTC))
    peaks = [record["peak_bytes"] for record in records if record.get("kind") == "memory" and record.get("peak_bytes")]
    speeds = [record.get("tokens_per_second") for record in records if record.get("kind") == "train"]
    known = [speed for speed in speeds if isinstance(speed, (int, float)) and np.isfinite(speed)]
    return StageWork(
        began=began,
        ended=ended,
        attempts=attempts,
        peak_bytes=int(peaks[-1]) if peaks else None,
        tokens_per_second=float(np.median(known)) if known else None,
        flops_per_token=_flops_per_token(manifest, profile),
        peak_flops=_peak_flops(attempts, profile),
        provenance=manifest.provenance,
    )


def _flops_per_token(manifest: CheckpointManifest, profile: Profile | None) -> int | None:
    if profile is None:
        return None
    cost = low_rank_cost if manifest.fingerprint_settings.get("stage.kind") in ("relora", "lora") else full_cost
    try:
        return cost(profile, counted_shape(profile)).flops_per_token
    except (ReLoRAError, OSError):  # a model whose shape only its files tell, and they are not here
        return None


def _peak_flops(attempts: Sequence[Mapping[str, Any]], profile: Profile | None) -> float | None:
    if not attempts or profile is None or "bfloat16" not in profile.precision.dtype:
        return None
    one = next((flops for name, flops in _PEAK_FLOPS.items() if name in attempts[-1]["device"]), None)
    return None if one is None else one * attempts[-1]["ranks"]


def rate_curve(
    stages: Sequence[tuple[Stage | None, Profile | None, CheckpointManifest]], train: TrainCurve
) -> RateCurve:
    """Return the learning rate of each stage by its schedule; of one whose settings do not tell, as it was logged."""
    steps, rates, logged = list[int](), list[float](), []
    for stage, profile, manifest in stages:
        if stage is None or profile is None:
            first = manifest.parent.step if manifest.parent else 0
            of_stage = train[(train.step > first) & (train.step <= manifest.step)]
            steps += of_stage.step.tolist()
            rates += of_stage["learning_rate"].tolist()
            logged.append(manifest.stage)
            continue
        corners = {profile.schedule.warmup_steps, profile.schedule.restart_warmup_steps}
        shown = np.linspace(stage.first_step, stage.end_step, max(2, RATE_POINTS // len(stages)))
        drawn = {round(step) for step in shown} | {stage.first_step + corner for corner in corners}
        for step in sorted(step for step in drawn if step <= stage.end_step):
            steps.append(step)
            rates.append(learning_rate(profile, stage, step))
    as_logged = f" As logged: {', '.join(logged)}." if logged else ""
    source = "By the schedule of the settings." if len(logged) < len(stages) else "As logged."
    return RateCurve(np.array(steps, dtype=np.int64), np.array(rates), source + (as_logged if source[0] == "B" else ""))


def waited(before: StageRow, row: StageRow) -> float | None:
    """Return the seconds that passed between the end of a stage and the beginning of the next."""
    if before.work is None or row.work is None:
        return None
    return max(0.0, (row.work.began - before.work.ended).total_seconds())


def wall_time_text(stages: Sequence[StageRow]) -> str:
    """Return the time from the beginning of the first to the end of the last, and how much of it was training."""
    works = [row.work for row in stages if row.work is not None]
    if not works:
        return MISSING
    began, ended = min(work.began for work in works), max(work.ended for work in works)
    wall, trained = (ended - began).total_seconds(), sum(row.seconds for row in stages)
    idle = max(0.0, wall - trained)
    when = f"{began:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M} UTC"
    return f"{duration(wall)} ({when}): {duration(trained)} in stages, {duration(idle)} between them or lost"


def attempts_text(work: StageWork | None) -> str:
    """Return '2: from step 0, then from the snapshot of step 250'; a dash where no attempt was recorded."""
    if work is None or not work.attempts:
        return MISSING
    steps = [count(attempt["step"]) for attempt in work.attempts[1:]]
    resumed = f", resumed at step {', '.join(steps)}" if steps else ""
    return f"{len(work.attempts)}{resumed}"


def machine_text(work: StageWork | None) -> str:
    """Return 'NVIDIA H200 × 8' of the last attempt."""
    if work is None or not work.attempts:
        return MISSING
    last = work.attempts[-1]
    return f"{last['device']} × {last['ranks']}" if last["ranks"] > 1 else str(last["device"])
