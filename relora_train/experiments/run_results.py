"""The result of one run of an experiment, from its checkpoints alone.

Every number is read from a store: what a flow remembers is not asked.
"""

import itertools
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.layout import experiment_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import CheckpointError, ObjectNotFoundError, ReLoRAError
from relora_train.experiments.experiment import PlannedRun
from relora_train.experiments.records import CurvePoint, ResetSize, RunResult, ScorePoint
from relora_train.reports.collect import collect_run_data, stage_peak_bytes
from relora_train.reports.run_data import RunData
from relora_train.reports.sources import content_shown
from relora_train.runs.divergence import divergence_text
from relora_train.runs.evaluations import dataset_of, recorded_evaluation
from relora_train.runs.plan import plan
from relora_train.runs.run import line_of
from relora_train.runs.task_scores import recorded_measure
from relora_train.settings.objectives import LOSS, SCORES, Measure
from relora_train.storage.base import ObjectStore, parse_json
from relora_train.storage.workspace import checkpoint_cache
from relora_train.training.models.shape import ShapeUnknownError

CURVE_BINS = 120
"""Points of a training curve, each the mean over its share of the budget."""


def find_result(store: ObjectStore, run: PlannedRun) -> RunResult | None:
    """Return the recorded result of a run that is finished and scored. If there is none, the run has to go on."""
    latest = _latest(store, run)
    if latest is None or latest.step < run.profile.schedule.total_steps:
        return None
    try:
        scores = recorded_evaluation(run.profile, latest, dataset_of(latest), store)
    except ObjectNotFoundError:
        return None
    if scores is not None and run.measure is not None:
        score = recorded_measure(latest, run.measure)
        scores = None if score is None else {**scores, "task_score": score}
    return None if scores is None else _result(run, latest, scores)


def find_unscored(store: ObjectStore, run: PlannedRun) -> CheckpointRef | None:
    """Return the last checkpoint of a finished run that its experiment's measure has still to score."""
    latest = _latest(store, run)
    finished = latest is not None and latest.step >= run.profile.schedule.total_steps
    return latest if run.measure and finished and find_result(store, run) is None else None


def diverged_result(store: ObjectStore, run: PlannedRun, message: str) -> RunResult:
    """Return a run that diverged, with the curve of the stages that it committed before."""
    return _result(run, _latest(store, run), {}).model_copy(update={"outcome": "diverged", "message": message})


def record_divergence(store: ObjectStore, experiment: str, run: PlannedRun, message: str) -> None:
    """Keep in the store that a run diverged with these settings, so that it is not made a second time.

    The policy for divergence is one of them, though it is in no run's name.
    """
    asked = run.profile.divergence.model_dump(mode="json")
    record = {"run_id": run.run_id, "arm": run.arm, "seed": run.seed, "message": message, "divergence": asked}
    store.put_bytes(_divergence_key(experiment, run), (json.dumps(record, indent=1) + "\n").encode())


def recorded_divergence(store: ObjectStore, experiment: str, run: PlannedRun) -> str | None:
    """Return the message of a divergence that is on record for the same settings; None otherwise."""
    try:
        record = parse_json(store.get_bytes(_divergence_key(experiment, run))[0])
        same = record["divergence"] == run.profile.divergence.model_dump(mode="json")
        return str(record["message"]) if same else None
    except (ObjectNotFoundError, ValueError, KeyError, TypeError):
        return None


def training_curve(tokens: NDArray[np.float64], loss: NDArray[np.float64], budget: int) -> tuple[CurvePoint, ...]:
    """Return the mean loss of each of CURVE_BINS equal shares of the budget, at the share's middle.

    Shares without records are left out, and so are records that are not finite.
    """
    finite = np.isfinite(loss) & np.isfinite(tokens)
    width = budget / CURVE_BINS
    share = np.clip(np.ceil(tokens[finite] / width).astype(int) - 1, 0, CURVE_BINS - 1)
    values = loss[finite]
    return tuple(
        CurvePoint(tokens=(int(index) + 0.5) * width, loss=float(values[share == index].mean()))
        for index in np.unique(share)
    )


def _latest(store: ObjectStore, run: PlannedRun) -> CheckpointRef | None:
    try:
        return CheckpointStore(store, run.run_id).latest()
    except CheckpointError:
        return None  # whatever is the matter is said when the run is gone on with


def _divergence_key(experiment: str, run: PlannedRun) -> str:
    return f"{experiment_prefix(experiment)}diverged/{run.run_id}.json"


def _result(run: PlannedRun, latest: CheckpointRef | None, scores: Mapping[str, Any]) -> RunResult:
    about: dict[str, Any] = {"arm": run.arm, "seed": run.seed, "run_id": run.run_id, "outcome": "trained"}
    with suppress(ReLoRAError, ShapeUnknownError):  # a shape that is not known on this machine
        planned = plan(run.profile)
        cost = planned.low_rank or planned.full
        about |= {"parameters": planned.parameters, "trainable_parameters": cost.trainable_parameters if cost else None}
    if latest is None:
        return RunResult(**about)
    with suppress(ReLoRAError, ValueError):  # the dataset may be gone
        about["content"] = content_shown(dataset_of(latest).manifest)
    line, fetch = line_of(latest), files_in_stores(checkpoint_cache(run.run_id))
    data = collect_run_data(line, fetch, spectra=False)
    own = [ref for ref in line if ref.manifest.run_id == run.run_id]
    peaks = [peak for ref in own if (peak := stage_peak_bytes(ref, fetch)) is not None]
    step_tokens = run.profile.batch.tokens
    budget = run.profile.schedule.total_steps * step_tokens

    def by_stage(measure: Measure) -> list[tuple[int, float]]:
        """Tokens and score at the start and after every stage, where it is finite."""
        points = [(data.stages[0].start_step, data.stages[0].before.of(measure))]
        points += [(row.end_step, row.after.of(measure)) for row in data.stages]
        return [(step * step_tokens, it) for step, it in points if it is not None and math.isfinite(it)]

    return RunResult(
        **about,
        checkpoint_uri=latest.uri,
        dataset_id=latest.manifest.dataset_id,
        **{name: scores.get(name) for name in (*SCORES, "task_score")},
        tokens_per_second=_speed(data, after=own[0].manifest.parent.step if own[0].manifest.parent else 0),
        tokens_per_second_in_all=_speed(data, after=0),
        peak_memory_bytes=max(peaks, default=None),
        seconds=sum(row.seconds for row in data.stages),
        resets=reset_sizes(data),
        lowered=tuple(f"{row.stage} {divergence_text(row.divergence)}" for row in data.stages if row.divergence),
        finished_at=latest.manifest.created_at.astimezone(UTC),
        versions=latest.manifest.versions,
        training=training_curve(data.train["tokens_seen"], data.train["loss"], budget),
        validation=tuple(CurvePoint(tokens=at, loss=loss) for at, loss in by_stage(LOSS)),
        scored=tuple(ScorePoint(tokens=at, score=score) for at, score in by_stage(data.measures.headline)),
    )


def _speed(data: RunData, *, after: int) -> float | None:
    """Tokens per second of training over the records after a step: all their tokens over all their time."""
    chosen = data.train.step > after
    tokens = np.diff(data.train["tokens_seen"], prepend=0.0)[chosen]
    rates = data.train["tokens_per_second"][chosen]
    known = np.isfinite(tokens) & np.isfinite(rates) & (rates > 0) & (tokens > 0)
    seconds = float((tokens[known] / rates[known]).sum())
    return float(tokens[known].sum()) / seconds if seconds > 0 else None


def reset_sizes(data: RunData) -> tuple[ResetSize, ...]:
    """Return the sizes of the first updates after each reset, from the steps that the trainer measured."""
    change, step = data.train["relative_weight_change"], data.train.step
    found = []
    for before, row in itertools.pairwise(data.stages):
        inside = (step > row.start_step) & (step < row.end_step) & np.isfinite(change)
        if row.cycle < 2 or before.cycle != row.cycle - 1 or not inside.any():
            continue
        last = change[step == before.end_step]
        found.append(
            ResetSize(
                cycle=row.cycle,
                largest_change=float(change[inside].max()),
                change_before=float(last[0]) if len(last) and np.isfinite(last[0]) else None,
                largest_a_move=float(data.train["lora_A_update_norm"][inside].max()),
            )
        )
    return tuple(found)
