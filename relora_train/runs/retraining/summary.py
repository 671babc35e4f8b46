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

STATE_NAMES = {
    "promoted": "Promoted",
    "refused": "Refused",
    "overtaken": "Overtaken",
    "no-new-data": "NoNewData",
    "not-enough-data": "NotEnoughData",
    "already-running": "AlreadyRunning",
}
"""Names of the flow run's final state. All of them are states of success."""


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


def summarize_idle(
    store: ObjectStore, series: str, outcome: Literal["no-new-data", "already-running"], reason: str
) -> RetrainSummary:
    """Summarize a retrain that had nothing to do."""
    champion = _champion_uri(store, series)
    return RetrainSummary(series=series, store_uri=store.uri, outcome=outcome, reason=reason, champion_uri=champion)


def summarize_not_enough(plan: RetrainPlan) -> RetrainSummary:
    """Summarize a retrain whose new documents do not fill one update; they stay new."""
    return RetrainSummary(
        series=plan.series,
        store_uri=plan.store_uri,
        outcome="not-enough-data",
        reason=f"the {len(plan.new)} new parts of the source do not fill one update; they wait for more",
        champion_uri=plan.champion.uri if plan.champion else None,
        run_id=plan.run_id,
        new_parts=len(plan.new),
    )


def summarize_retrain(
    plan: RetrainPlan, decision: Decision, stages: Sequence[StageOutcome], *, report_uri: str
) -> RetrainSummary:
    """Summarize a retrain that made a candidate."""
    return RetrainSummary(
        series=plan.series,
        store_uri=plan.store_uri,
        outcome=decision.outcome,
        reason=decision.reason,
        champion_uri=_champion_uri(open_store(plan.store_uri), plan.series),
        run_id=plan.run_id,
        candidate_uri=decision.candidate_uri,
        scores=decision.scores,
        new_parts=len(plan.new),
        stages_trained=sum(not outcome.reused for outcome in stages),
        stages_reused=sum(outcome.reused for outcome in stages),
        report_uri=report_uri,
    )


def retrain_markdown(summary: RetrainSummary) -> str:
    """Return the decision as Markdown, for the orchestrator's UI."""
    rows = {
        "outcome": f"**{summary.outcome}**: {summary.reason}",
        "champion now": summary.champion_uri,
        "candidate": summary.candidate_uri,
        "validation loss of the candidate": _loss_text(summary.scores.get("candidate_loss")),
        "of the champion, on the same held-out set": _loss_text(summary.scores.get("champion_loss")),
        "held-out set": summary.scores.get("dataset_uri"),
        "new parts of the source": str(summary.new_parts),
        "run": summary.run_id,
        "report": summary.report_uri,
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    advice = (
        f"\n\nTo take the promotion back: `relora rollback {summary.series}`"
        if summary.outcome == "promoted"
        else f"\n\nTo promote it all the same: `relora promote {summary.series} {summary.candidate_uri}`"
        if summary.candidate_uri
        else ""
    )
    return "\n".join([f"# Series {summary.series}", "", "| | |", "| --- | --- |", *lines]) + advice


def _champion_uri(store: ObjectStore, series: str) -> str | None:
    found = find_series(store, series)
    return f"{store.uri}/{found[0].latest.checkpoint}" if found else None


def _loss_text(value: Any) -> str | None:
    return f"{value:.4f}" if isinstance(value, float) else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
