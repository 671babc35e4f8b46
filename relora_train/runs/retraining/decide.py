"""Decide whether a retrain's candidate is promoted, and keep the decision.

A refused candidate's data counts as seen unless `retry_refused`: the next night's candidate would be refused for the
same reason, and old data come back through `old_data_ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.series import promote, who
from relora_train.checkpoints.series_record import Scores
from relora_train.errors import PreconditionFailedError
from relora_train.runs.retraining.options import MarginKind
from relora_train.runs.retraining.retrain import RetrainPlan
from relora_train.runs.retraining.series_data import Decision, Outcome, end, record_decision, scores_record
from relora_train.runs.run import DatasetRef
from relora_train.storage.opening import open_store


def conclude(
    plan: RetrainPlan,
    candidate: CheckpointRef,
    evaluation: Mapping[str, Any],
    champion_evaluation: Mapping[str, Any] | None,
    dataset: DatasetRef,
    *,
    provenance: Mapping[str, str],
) -> Decision:
    """Promote the candidate or refuse it, keep the decision, then count its data as seen. Safe to kill and to repeat.

    If the champion changed since the plan was made, the two were not compared. Then nothing is promoted ('overtaken'),
    and the data stay new for a retrain that goes on from the other champion.
    """
    if plan.lease is not None:
        plan.lease.check()
    store, options = open_store(plan.store_uri), plan.options
    scores = Scores(
        candidate_loss=evaluation["val_loss"],
        champion_loss=champion_evaluation["val_loss"] if champion_evaluation else None,
        dataset_uri=dataset.uri,
    )
    better, reason = judge(scores.candidate_loss, scores.champion_loss, options.margin, options.margin_kind)
    outcome: Outcome = "refused"
    if better:
        expected = plan.champion.prefix if plan.champion else None
        try:
            promote(store, plan.series, candidate, reason=reason, expected=expected, run_id=plan.run_id, scores=scores)
            outcome = "promoted"
        except PreconditionFailedError as error:
            outcome, reason = "overtaken", str(error)
    decision = Decision(
        series=plan.series,
        run_id=plan.run_id,
        outcome=outcome,
        reason=reason,
        candidate_uri=candidate.uri,
        champion_uri=plan.champion.uri if plan.champion else None,
        scores=scores_record(scores),
        margin=f"{options.margin:g} {options.margin_kind}",
        new=plan.new,
        data_is_seen=outcome == "promoted" or (outcome == "refused" and not options.retry_refused),
        by=who(),
        provenance=dict(provenance),
    )
    record_decision(store, decision)
    seen = plan.new if decision.data_is_seen else ()
    end(store, plan.series, seen, replaces=plan.profile.data.source == "hub")
    return decision


def judge(candidate: float, champion: float | None, margin: float, kind: MarginKind) -> tuple[bool, str]:
    """Return True if a candidate's validation loss beats the champion's by the margin, and the reason. Pure.

    Without a champion any finite loss is enough. With margin 0 the loss must still be lower, not equal.
    """
    if not math.isfinite(candidate):
        return False, f"its validation loss is {candidate}"
    if champion is None:
        return True, f"first of its series, validation loss {candidate:.4f}"
    needed = margin * champion if kind == "relative" else margin
    asked = f"{margin:.2%}" if kind == "relative" else f"{margin:g}"
    gain = champion - candidate
    shown = f"validation loss {candidate:.4f} against {champion:.4f}, better by {gain:.4f} ({gain / champion:.2%})"
    if not math.isfinite(champion):
        return True, f"validation loss {candidate:.4f} against {champion}"
    return gain > 0 and gain >= needed, f"{shown}; a margin of {asked} is asked for"
