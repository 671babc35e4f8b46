"""What an experiment came to, as records: runs, arms, differences, the whole. Imports no torch."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from relora_train.reports.statistics import Estimate
from relora_train.settings.base import FrozenConfig
from relora_train.settings.measures import Measure, Measures
from relora_train.settings.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, ObjectiveName


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
    command_name: str = ""
    """What `relora compare` is given: the name of a shipped one, or the file's."""

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

    base: dict[str, Any] = Field(default_factory=dict)
    """What the experiment sets over the profile, for every arm."""

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
