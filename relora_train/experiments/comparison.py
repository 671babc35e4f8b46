"""What the runs of an experiment came to, from their checkpoints alone: a table over seeds, and paired differences.

Every number is read from a store: what a flow remembers is not asked. Imports no torch.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from relora_train.checkpoint_layout import experiment_prefix
from relora_train.checkpoint_store import CheckpointRef, CheckpointStore
from relora_train.divergence import divergence_text
from relora_train.errors import CheckpointError, ObjectNotFoundError, ReLoRAError, RunSettingsChangedError
from relora_train.evaluation_records import dataset_of, recorded_evaluation
from relora_train.experiments.experiment import Experiment, PlannedRun
from relora_train.experiments.statistics import Estimate, estimate, paired_difference
from relora_train.model_shape import ShapeUnknownError
from relora_train.objectives.measures import LOSS, Measure, Measures
from relora_train.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES, SCORES, ObjectiveName
from relora_train.plan import plan
from relora_train.reporting.collect import collect_run_data, files_in_stores, stage_peak_bytes
from relora_train.reporting.run_data import RunData
from relora_train.run import line_of
from relora_train.settings.base import FrozenConfig
from relora_train.storage.base import ObjectStore
from relora_train.workspace import checkpoint_cache

CURVE_BINS = 120
"""Points of a training curve, each the mean over its share of the budget."""


class CurvePoint(FrozenConfig):
    """A loss after so many tokens."""

    tokens: float
    loss: float


class ResetSize(FrozenConfig):
    """The first updates after one reset of the optimizer, while the learning rate climbs back."""

    cycle: int
    """That they belong to; 2 or later."""

    largest_change: float
    """What one of them changed the wrapped weights by, at most, relative to their norm."""

    change_before: float | None
    """The same of the last update before the merge."""

    largest_a_move: float
    """What one of them moved A by, at most: Frobenius norm over all layers."""

    @property
    def ratio(self) -> float | None:
        """largest_change over change_before."""
        return self.largest_change / self.change_before if self.change_before else None


class ScorePoint(FrozenConfig):
    """A score after so many tokens."""

    tokens: float
    score: float


class RunResult(FrozenConfig):
    """One arm at one seed."""

    arm: str
    seed: int
    run_id: str
    outcome: Literal["trained", "diverged"]
    message: str = ""
    """Of a run that diverged: where and how."""

    checkpoint_uri: str | None = None
    dataset_id: str | None = None
    val_loss: float | None = None
    """Nats a token or an image, of what is held out, by the evaluation task."""

    val_perplexity: float | None = None
    bits_per_byte: float | None = None
    val_accuracy: float | None = None
    tokens_per_second: float | None = None
    """Of the arm's own stages: without a warm start that it branched from. Training only."""

    tokens_per_second_in_all: float | None = None
    """Over all its tokens, the warm start's included."""

    peak_memory_bytes: int | None = None
    """The highest of the arm's own stages, on the first rank's device."""

    seconds: float | None = None
    """Of all its stages, as if it had trained its warm start itself."""

    trainable_parameters: int | None = None
    parameters: int | None = None
    resets: tuple[ResetSize, ...] = ()
    """Of every cycle but the first, where the trainer recorded it."""

    lowered: tuple[str, ...] = ()
    """Stages that were trained at a lower learning rate because they diverged."""

    finished_at: datetime | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    training: tuple[CurvePoint, ...] = ()
    """Training loss: the mean of each of CURVE_BINS shares of the budget that has records."""

    validation: tuple[CurvePoint, ...] = ()
    """Validation loss by the trainer, at the start of the run and after every stage."""

    scored: tuple[ScorePoint, ...] = ()
    """The objective's first measure there."""


class ArmResult(FrozenConfig):
    """A row of the table: an arm over its seeds."""

    arm: str
    label: str
    about: str
    paper: float | Literal["diverged"] | None
    trained: int
    diverged: int
    val_loss: Estimate | None
    val_perplexity: Estimate | None
    bits_per_byte: Estimate | None
    val_accuracy: Estimate | None = None
    tokens_per_second: Estimate | None
    tokens_per_second_in_all: Estimate | None
    peak_memory_bytes: Estimate | None
    seconds: Estimate | None
    largest_first_change: Estimate | None
    """Of a run's ResetSize.largest_change the largest, over the seeds."""
    first_change_ratio: Estimate | None
    """Of a run's ResetSize.ratio the largest, over the seeds."""
    largest_a_move: Estimate | None
    """Of a run's ResetSize.largest_a_move the largest, over the seeds."""
    trainable_parameters: int | None
    parameters: int | None

    def score(self, measure: Measure) -> Estimate | None:
        """Over seeds."""
        value: Estimate | None = getattr(self, measure.key)
        return value


class Difference(FrozenConfig):
    """An arm less the reference, over the seeds that both finished."""

    arm: str
    val_loss: Estimate | None
    val_perplexity: Estimate | None
    val_accuracy: Estimate | None = None

    def score(self, measure: Measure) -> Estimate | None:
        """Over the pairs."""
        value: Estimate | None = getattr(self, measure.key)
        return value


class Comparison(FrozenConfig):
    """A finished experiment."""

    experiment: str
    title: str
    objective: ObjectiveName = DEFAULT_OBJECTIVE
    profile: str
    digest: str
    budget_tokens: int
    full_budget_tokens: int
    """The file's; another one where overrides changed it."""

    seeds: tuple[int, ...]
    reference: str
    paper_source: str
    paper_measure: str
    overrides: dict[str, Any]
    unreached: dict[str, tuple[str, ...]]
    """Overridden keys that some arms set themselves, and these arms."""

    changes: dict[str, dict[str, Any]]
    """What each arm sets."""

    search: dict[str, str] = Field(default_factory=dict)
    """What was tried to find the arms' settings -> what it came to."""

    arms: tuple[ArmResult, ...]
    differences: tuple[Difference, ...]
    runs: tuple[RunResult, ...]

    @property
    def measures(self) -> Measures:
        """What the arms are scored and compared by."""
        return OBJECTIVES[self.objective].measures

    def label(self, arm: str) -> str:
        return next(row.label for row in self.arms if row.arm == arm)


class ComparisonSummary(FrozenConfig):
    """What the flow compare returns."""

    comparison: Comparison
    html_uri: str
    json_uri: str
    picture_uris: tuple[str, ...]
    reused: int
    """Runs that were there already."""


def find_result(store: ObjectStore, run: PlannedRun) -> RunResult | None:
    """What is recorded of a run that is finished and scored, or None: then it has to be run, or run on."""
    latest = _latest(store, run)
    if latest is None or latest.step < run.profile.schedule.total_steps:
        return None
    try:
        scores = recorded_evaluation(run.profile, latest, dataset_of(latest), store)
    except ObjectNotFoundError:
        return None
    return None if scores is None else _result(run, latest, scores)


def diverged_result(store: ObjectStore, run: PlannedRun, message: str) -> RunResult:
    """A run that diverged, with the curve of the stages that it committed before."""
    latest = _latest(store, run)
    counted = _counted(run)
    if latest is None:
        return RunResult(arm=run.arm, seed=run.seed, run_id=run.run_id, outcome="diverged", message=message, **counted)
    return _result(run, latest, {}).model_copy(update={"outcome": "diverged", "message": message})


def record_divergence(store: ObjectStore, experiment: str, run: PlannedRun, message: str) -> None:
    """Keep in the store that a run diverged with these settings, so that it is not made a second time."""
    record = {"run_id": run.run_id, "arm": run.arm, "seed": run.seed, "message": message}
    store.put_bytes(_divergence_key(experiment, run), (json.dumps(record, indent=1) + "\n").encode())


def recorded_divergence(store: ObjectStore, experiment: str, run: PlannedRun) -> str | None:
    """The message of a divergence that is on record; None otherwise."""
    try:
        return str(json.loads(store.get_bytes(_divergence_key(experiment, run))[0])["message"])
    except (ObjectNotFoundError, ValueError, KeyError, TypeError):
        return None


def compare_results(experiment: Experiment, results: Sequence[RunResult]) -> Comparison:
    """The table and the differences. Pure.

    Raises RunSettingsChangedError for arms that were trained on different datasets: they cannot be compared.
    """
    _check_one_dataset(results)
    config = experiment.config
    arms = tuple(_arm_result(name, experiment, results) for name in config.arms)
    return Comparison(
        experiment=experiment.name,
        title=config.title,
        objective=experiment.runs[0].profile.objective,
        profile=experiment.profile,
        digest=experiment.digest,
        budget_tokens=experiment.budget_tokens,
        full_budget_tokens=config.budget_tokens,
        seeds=experiment.seeds,
        reference=config.reference,
        paper_source=config.paper_source,
        paper_measure=config.paper_measure,
        overrides=dict(experiment.overrides),
        unreached=dict(experiment.unreached),
        changes={name: arm.set for name, arm in config.arms.items()},
        search=config.search,
        arms=arms,
        differences=tuple(_difference(name, config.reference, results) for name in config.arms),
        runs=tuple(results),
    )


def training_curve(tokens: NDArray[np.float64], loss: NDArray[np.float64], budget: int) -> tuple[CurvePoint, ...]:
    """Mean loss of each of CURVE_BINS equal shares of the budget, at the share's middle; shares without records are
    left out, and so are records that are not finite."""
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


def _result(run: PlannedRun, latest: CheckpointRef, scores: Mapping[str, Any]) -> RunResult:
    line = line_of(latest)
    fetch = files_in_stores(checkpoint_cache(run.run_id))
    data = collect_run_data(line, fetch, spectra=False)
    own = [ref for ref in line if ref.manifest.run_id == run.run_id]
    peaks = [peak for ref in own if (peak := stage_peak_bytes(ref, fetch)) is not None]
    own_start = own[0].manifest.parent.step if own[0].manifest.parent else 0
    manifest = latest.manifest
    budget = run.profile.schedule.total_steps * run.profile.batch.tokens
    return RunResult(
        arm=run.arm,
        seed=run.seed,
        run_id=run.run_id,
        outcome="trained",
        checkpoint_uri=latest.uri,
        dataset_id=manifest.dataset_id,
        **{name: scores.get(name) for name in SCORES},
        tokens_per_second=_speed(data, after=own_start),
        tokens_per_second_in_all=_speed(data, after=0),
        peak_memory_bytes=max(peaks, default=None),
        seconds=sum(row.seconds for row in data.stages),
        resets=reset_sizes(data),
        lowered=tuple(f"{row.stage} {divergence_text(row.divergence)}" for row in data.stages if row.divergence),
        finished_at=manifest.created_at.astimezone(UTC),
        versions=manifest.versions,
        training=training_curve(data.train["tokens_seen"], data.train["loss"], budget),
        validation=_validation(data, run.profile.batch.tokens),
        scored=_scored(data, run.profile.batch.tokens),
        **_counted(run),
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
    """What the first updates after each reset did, from the records of the steps that the trainer measured."""
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


def _validation(data: RunData, step_tokens: int) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(tokens=at, loss=loss) for at, loss in _by_stage(data, LOSS, step_tokens))


def _scored(data: RunData, step_tokens: int) -> tuple[ScorePoint, ...]:
    found = _by_stage(data, data.measures.headline, step_tokens)
    return tuple(ScorePoint(tokens=at, score=score) for at, score in found)


def _by_stage(data: RunData, measure: Measure, step_tokens: int) -> list[tuple[int, float]]:
    """Tokens and score at the start and after every stage, where it is finite."""
    points = [(row.end_step * step_tokens, row.after.of(measure)) for row in data.stages]
    points.insert(0, (data.stages[0].start_step * step_tokens, data.stages[0].before.of(measure)))
    return [(at, score) for at, score in points if score is not None and math.isfinite(score)]


def _counted(run: PlannedRun) -> dict[str, int | None]:
    """Parameters, counted from the shape; None where it is not known on this machine."""
    try:
        planned = plan(run.profile)
    except (ReLoRAError, ShapeUnknownError):
        return {}
    cost = planned.low_rank or planned.full
    return {"parameters": planned.parameters, "trainable_parameters": cost.trainable_parameters if cost else None}


def _check_one_dataset(results: Sequence[RunResult]) -> None:
    by_dataset: dict[str, list[str]] = {}
    for result in results:
        if result.dataset_id is not None:
            by_dataset.setdefault(result.dataset_id, []).append(result.run_id)
    if len(by_dataset) > 1:
        shown = "".join(f"\n  - {dataset[:12]}: {', '.join(runs)}" for dataset, runs in by_dataset.items())
        raise RunSettingsChangedError(
            f"The arms were trained on different data, so they cannot be compared (dataset: runs):{shown}\n"
            "The source changed between two runs of the experiment. Run it in another store, or delete the runs on the "
            "data that is gone."
        )


def _arm_result(name: str, experiment: Experiment, results: Sequence[RunResult]) -> ArmResult:
    config = experiment.config.arms[name]
    of_arm = [result for result in results if result.arm == name]
    trained = [result for result in of_arm if result.outcome == "trained"]

    resets = [result.resets for result in of_arm if result.resets]  # of those that diverged later, too

    def over_seeds(field: str) -> Estimate | None:
        values = [getattr(result, field) for result in trained]
        return estimate([float(value) for value in values if value is not None and math.isfinite(value)])

    return ArmResult(
        arm=name,
        label=config.label,
        about=config.about,
        paper=config.paper,
        trained=len(trained),
        diverged=len(of_arm) - len(trained),
        val_loss=over_seeds("val_loss"),
        val_perplexity=over_seeds("val_perplexity"),
        bits_per_byte=over_seeds("bits_per_byte"),
        val_accuracy=over_seeds("val_accuracy"),
        tokens_per_second=over_seeds("tokens_per_second"),
        tokens_per_second_in_all=over_seeds("tokens_per_second_in_all"),
        peak_memory_bytes=over_seeds("peak_memory_bytes"),
        seconds=over_seeds("seconds"),
        largest_first_change=estimate([max(size.largest_change for size in sizes) for sizes in resets]),
        first_change_ratio=estimate([max(found) for sizes in resets if (found := _ratios(sizes))]),
        largest_a_move=estimate([max(size.largest_a_move for size in sizes) for sizes in resets]),
        trainable_parameters=of_arm[0].trainable_parameters if of_arm else None,
        parameters=of_arm[0].parameters if of_arm else None,
    )


def _ratios(sizes: Sequence[ResetSize]) -> list[float]:
    return [size.ratio for size in sizes if size.ratio is not None]


def _difference(arm: str, reference: str, results: Sequence[RunResult]) -> Difference:
    def by_seed(name: str, field: str) -> dict[int, float]:
        return {
            result.seed: getattr(result, field)
            for result in results
            if result.arm == name and result.outcome == "trained" and getattr(result, field) is not None
        }

    values = {
        field: paired_difference(by_seed(arm, field), by_seed(reference, field))
        for field in ("val_loss", "val_perplexity", "val_accuracy")
    }
    return Difference(arm=arm, **values)
