"""The results of an experiment as records: runs, arms, differences, the whole."""

from dataclasses import replace
from datetime import datetime
from typing import Any, Literal, cast

from pydantic import Field

from relora_train.reports.statistics import Estimate
from relora_train.settings.base import FrozenConfig
from relora_train.settings.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, Measure, Objective, ObjectiveName
from relora_train.settings.tasks import TaskMeasure


class CurvePoint(FrozenConfig):
    """A loss after so many tokens."""

    tokens: float
    loss: float


class ResetSize(FrozenConfig):
    """The first updates after one reset of the optimizer, while the learning rate climbs back."""

    cycle: int
    """The cycle of these updates; 2 or later."""

    largest_change: float
    """The largest change of the wrapped weights by one update, relative to their norm."""

    change_before: float | None
    """The same of the last update before the merge."""

    largest_a_move: float
    """The largest move of A by one update: Frobenius norm over all layers."""

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
    """The step and the loss at which a run diverged."""

    checkpoint_uri: str | None = None
    dataset_id: str | None = None
    content: str = ""
    """The corpus by its digest, or the revision of a hub's."""

    val_loss: float | None = None
    """Nats a token or an image, of what is held out, by the evaluation task."""

    val_perplexity: float | None = None
    bits_per_byte: float | None = None
    val_accuracy: float | None = None
    val_f1: float | None = None
    val_masked_perplexity: float | None = None
    val_exact_match: float | None = None
    task_score: float | None = None
    """The experiment's measure."""
    tokens_per_second: float | None = None
    """Speed of training in the arm's own stages, without a warm start that it branched from."""

    tokens_per_second_in_all: float | None = None
    """Over all its tokens, the warm start's included."""

    peak_memory_bytes: int | None = None
    """The highest of the arm's own stages, on the first rank's device."""

    seconds: float | None = None
    """Time of all its stages, as if the arm had trained its warm start itself."""

    trainable_parameters: int | None = None
    parameters: int | None = None
    resets: tuple[ResetSize, ...] = ()
    """One for each cycle but the first, if the trainer recorded it."""

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


class _Estimates(FrozenConfig):
    def score(self, measure: Measure) -> Estimate | None:
        return cast(Estimate | None, getattr(self, measure.key))


class ArmResult(_Estimates):
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
    val_f1: Estimate | None = None
    val_masked_perplexity: Estimate | None = None
    val_exact_match: Estimate | None = None
    task_score: Estimate | None = None
    tokens_per_second: Estimate | None
    tokens_per_second_in_all: Estimate | None
    peak_memory_bytes: Estimate | None
    seconds: Estimate | None
    largest_first_change: Estimate | None
    """Mean over the seeds of each run's largest ResetSize.largest_change."""
    first_change_ratio: Estimate | None
    """Mean over the seeds of each run's largest ResetSize.ratio."""
    largest_a_move: Estimate | None
    """Mean over the seeds of each run's largest ResetSize.largest_a_move."""
    trainable_parameters: int | None
    parameters: int | None


class Difference(_Estimates):
    """An arm less the reference, over the seeds that both finished."""

    arm: str
    val_loss: Estimate | None
    val_perplexity: Estimate | None
    val_accuracy: Estimate | None = None
    val_f1: Estimate | None = None
    val_masked_perplexity: Estimate | None = None
    val_exact_match: Estimate | None = None
    task_score: Estimate | None = None


class Comparison(FrozenConfig):
    """A finished experiment."""

    experiment: str
    command_name: str = ""
    title: str
    objective: ObjectiveName = DEFAULT_OBJECTIVE
    measure: TaskMeasure | None = None
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
    base: dict[str, Any] = Field(default_factory=dict)
    changes: dict[str, dict[str, Any]]
    """Settings of each arm."""

    search: dict[str, str] = Field(default_factory=dict)
    arms: tuple[ArmResult, ...]
    differences: tuple[Difference, ...]
    runs: tuple[RunResult, ...]

    @property
    def trained_by(self) -> Objective:
        """The scores of the objective, which the trainer takes after every stage."""
        return OBJECTIVES[self.objective]

    @property
    def measures(self) -> Objective:
        """The scores that arms are compared by."""
        ours = self.measure and self.measure.measure
        return replace(self.trained_by, headline=ours, judged=ours) if ours else self.trained_by

    @property
    def headline_name(self) -> str:
        return self.measure.score if self.measure else f"Validation {self.measures.headline.name}"

    def label(self, arm: str) -> str:
        return next(row.label for row in self.arms if row.arm == arm)


class ComparisonSummary(FrozenConfig):
    """The result of the flow compare."""

    comparison: Comparison
    html_uri: str
    json_uri: str
    picture_uris: tuple[str, ...]
    reused: int
    """Runs that were there already."""
