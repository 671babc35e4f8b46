"""The retrain as an operator sees it: its parameters with their bounds, and the summary of what it came to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from relora_train.checkpoints.series_record import find_series
from relora_train.errors import ConfigError
from relora_train.runs.retraining.series_data import Outcome
from relora_train.settings.base import Address, FrozenConfig
from relora_train.settings.tasks import TaskMeasure, TaskScore
from relora_train.storage.base import ObjectStore

if TYPE_CHECKING:
    from relora_train.runs.retraining.retrain import RetrainPlan
    from relora_train.runs.run import StageOutcome

Cycles = Annotated[int, Field(ge=1, le=1000, description="Cycles a retrain adds to its champion's")]
Margin = Annotated[
    float, Field(ge=0, le=10, description="By how much the loss must fall, or the gate's score rise, to be promoted")
]
MarginKind = Annotated[
    Literal["relative", "absolute"],
    Field(description="relative: share of the champion's loss or score, below 1; absolute: nats per token, or points"),
]
OldDataRatio = Annotated[
    float, Field(ge=0, lt=1, description="Share of the training text that is old data mixed in, against forgetting")
]


class RetrainOptions(FrozenConfig):
    """The options of a retrain."""

    cycles: Cycles = 1
    margin: Margin = 0.0
    margin_kind: MarginKind = "relative"
    old_data_ratio: OldDataRatio = 0.25
    fresh_warm_start: bool = False
    """Train the whole plan anew on all data, instead of going on from the champion."""
    gate: TaskScore | None = None
    """TASK/METRIC of lm-evaluation-harness that decides in place of the loss; higher is better."""
    gate_include: Address | None = None
    """Directory of YAML files, for a task of your own."""
    gate_limit: int | None = Field(None, ge=1)
    """Documents of the gate's task; all when absent."""
    retry_refused: bool = False
    """A refused candidate's data stays new: the next retrain takes it again, with what has come since."""

    @model_validator(mode="after")
    def relative_margin_is_below_one(self) -> Self:
        if self.margin_kind == "relative" and self.margin >= 1:
            raise ValueError(f"a relative margin of {self.margin:g} cannot be reached: it must be below 1")
        return self

    @model_validator(mode="after")
    def there_is_a_gate(self) -> Self:
        if self.gate is None and (self.gate_include or self.gate_limit):
            raise ValueError("gate_include and gate_limit say how a gate is scored, and there is no gate")
        return self

    @property
    def measure(self) -> TaskMeasure | None:
        """The score that decides, if that is not the loss."""
        return TaskMeasure(score=self.gate, include=self.gate_include, limit=self.gate_limit) if self.gate else None


def retrain_options(**options: Any) -> RetrainOptions:
    """Return checked options. Raise ConfigError with all faults at once."""
    try:
        return RetrainOptions(**options)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))} {fault['msg'].removeprefix('Value error, ')}".strip()
            for fault in error.errors()
        )
        raise ConfigError(f"The retrain's options are not valid: {faults}. Correct them and run again.") from None


RetrainOutcome = Outcome | Literal["no-new-data", "not-enough-data", "already-running"]


class RetrainSummary(FrozenConfig):
    """A finished retrain."""

    series: str
    store_uri: str
    outcome: RetrainOutcome
    reason: str
    champion_uri: str | None
    """The champion now."""

    run_id: str | None = None
    candidate_uri: str | None = None
    scores: dict[str, Any] = Field(default_factory=dict)
    """candidate_loss, champion_loss in nats per token; dataset_uri; with a gate its name and both scores."""

    new_parts: int = 0
    """New source files, or 1 for a hub revision."""

    stages_trained: int = 0
    stages_reused: int = 0
    report_uri: str | None = None


def state_name(outcome: RetrainOutcome) -> str:
    """Return the name of the flow run's final state, such as NoNewData. All of them are states of success."""
    return "".join(word.capitalize() for word in outcome.split("-"))


def summarize(
    store: ObjectStore,
    series: str,
    outcome: RetrainOutcome,
    reason: str,
    *,
    plan: "RetrainPlan | None" = None,
    stages: "Sequence[StageOutcome]" = (),
    **fields: Any,
) -> RetrainSummary:
    """Summarize a retrain: how far it came, and what else is known of it."""
    found, reused = find_series(store, series), sum(stage.reused for stage in stages)
    if plan is not None:
        fields |= {"run_id": plan.run_id, "new_parts": len(plan.new)}
    return RetrainSummary(
        series=series,
        store_uri=store.uri,
        outcome=outcome,
        reason=reason,
        champion_uri=f"{store.uri}/{found[0].latest.checkpoint}" if found else None,
        stages_trained=len(stages) - reused,
        stages_reused=reused,
        **fields,
    )
