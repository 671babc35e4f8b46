"""The summary of a retrain, as the command line prints it and an operator reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from relora_train.checkpoints.series_record import find_series
from relora_train.runs.retraining.retrain import RetrainPlan
from relora_train.runs.retraining.series_data import Decision, Outcome
from relora_train.runs.run import StageOutcome
from relora_train.settings.base import FrozenConfig
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store


class RetrainSummary(FrozenConfig):
    """A finished retrain."""

    series: str
    store_uri: str
    outcome: Outcome | Literal["no-new-data", "not-enough-data", "already-running"]
    reason: str
    champion_uri: str | None
    """The champion now."""

    run_id: str | None = None
    candidate_uri: str | None = None
    scores: dict[str, Any] = Field(default_factory=dict)
    """candidate_loss, champion_loss in nats per token; dataset_uri."""

    new_parts: int = 0
    """New source files, or 1 for a hub revision."""

    stages_trained: int = 0
    stages_reused: int = 0
    report_uri: str | None = None

    @property
    def state_name(self) -> str:
        """Name of the flow run's final state, such as NoNewData. All of them are states of success."""
        return state_name(self.outcome)


def state_name(outcome: str) -> str:
    """Return 'NoNewData' for 'no-new-data'."""
    return "".join(word.capitalize() for word in outcome.split("-"))


def summarize(
    store: ObjectStore,
    series: str,
    outcome: Outcome | Literal["no-new-data", "not-enough-data", "already-running"],
    reason: str,
    **fields: Any,
) -> RetrainSummary:
    """Summarize a retrain. fields: what else is known of it."""
    found = find_series(store, series)
    champion = f"{store.uri}/{found[0].latest.checkpoint}" if found else None
    return RetrainSummary(
        series=series, store_uri=store.uri, outcome=outcome, reason=reason, champion_uri=champion, **fields
    )


def summarize_retrain(
    plan: RetrainPlan, decision: Decision, stages: Sequence[StageOutcome], *, report_uri: str
) -> RetrainSummary:
    """Summarize a retrain that made a candidate."""
    reused = sum(outcome.reused for outcome in stages)
    return summarize(
        open_store(plan.store_uri),
        plan.series,
        decision.outcome,
        decision.reason,
        run_id=plan.run_id,
        candidate_uri=decision.candidate_uri,
        scores=decision.scores,
        new_parts=len(plan.new),
        stages_trained=len(stages) - reused,
        stages_reused=reused,
        report_uri=report_uri,
    )


def retrain_markdown(summary: RetrainSummary) -> str:
    """Return the decision as Markdown, for the orchestrator's UI."""
    scores = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in summary.scores.items()}
    rows = {
        "outcome": f"**{summary.outcome}**: {summary.reason}",
        "champion now": summary.champion_uri,
        "candidate": summary.candidate_uri,
        "validation loss of the candidate": scores.get("candidate_loss"),
        "of the champion, on the same held-out set": scores.get("champion_loss"),
        "held-out set": scores.get("dataset_uri"),
        "new parts of the source": str(summary.new_parts),
        "run": summary.run_id,
        "report": summary.report_uri,
    }
    lines = [f"# Series {summary.series}", "", "| | |", "| --- | --- |"]
    for name, value in rows.items():
        if value:
            cell = value.replace("|", "\\|")
            lines.append(f"| {name} | {cell} |")
    if summary.outcome == "promoted":
        lines += ["", f"To take the promotion back: `relora rollback {summary.series}`"]
    elif summary.candidate_uri:
        lines += ["", f"To promote it all the same: `relora promote {summary.series} {summary.candidate_uri}`"]
    return "\n".join(lines)
