"""The tasks of a retrain beside training: look for new data, prepare it, decide about its candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.runtime import deployment

from relora_train import events
from relora_train.checkpoints.lease import Lease
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.errors import RunInUseError
from relora_train.runs.datasets import DatasetOutcome
from relora_train.runs.retraining.interface import (
    RetrainOptions,
    RetrainSummary,
    state_name,
    summarize,
)
from relora_train.runs.retraining.retrain import RetrainPlan, conclude, plan_retrain, prepare_next, start
from relora_train.runs.retraining.series_data import Decision
from relora_train.runs.run import DatasetRef, Run
from relora_train.settings.profile import Profile
from relora_train.storage.opening import open_store
from tasks.artifacts import publish_markdown
from tasks.dask_ranges import ranges_on
from tasks.observe import forward_events, named, provenance, run_logger
from tasks.policies import STORE_IO
from tasks.run import tell_dataset


@task(**STORE_IO, task_run_name="look-for-new-data-{series}")
def look_for_new_data(
    series: str, store_uri: str, settings: Profile, options: RetrainOptions, lease: Lease
) -> RetrainPlan | None:
    """Return the RetrainPlan, or None when the source holds nothing new."""
    plan = plan_retrain(open_store(store_uri), series, settings, options, lease=lease)
    if plan is not None:
        run_logger().info("%s: %d new parts of the source, run %s", series, len(plan.new), plan.run_id)
    return plan


@task(**STORE_IO, task_run_name="tokenize-new-data-{plan.series}")
def tokenize_new_data(run: Run, plan: RetrainPlan) -> DatasetOutcome | None:
    """Return the DatasetOutcome of a plan's documents, or None when they do not fill one update."""
    outcome = prepare_next(run, plan, on_event=forward_events(), map_ranges=ranges_on(run.profile.data.dask))
    return None if outcome is None else tell_dataset(outcome)


@task(**STORE_IO, task_run_name="begin-{plan.run_id}")
def begin_training(plan: RetrainPlan) -> None:
    """Write down what data the training that begins now takes."""
    start(plan)


@task(**STORE_IO, task_run_name="decide-{plan.run_id}")
def decide_promotion(
    plan: RetrainPlan,
    candidate: CheckpointRef,
    evaluation: Mapping[str, Any],
    champion_evaluation: Mapping[str, Any] | None,
    dataset: DatasetRef,
) -> Decision:
    """Promote the candidate if it is better by the margin; return the Decision either way."""
    decision = conclude(plan, candidate, evaluation, champion_evaluation, dataset, provenance=provenance())
    events.emit("decided", series=plan.series, outcome=decision.outcome, reason=decision.reason, uri=candidate.uri)
    return named(state_name(decision.outcome), decision, decision.reason)


def tell_already_running(series: str, store_uri: str, error: RunInUseError) -> RetrainSummary:
    """End a deployment's retrain in order when another one of the series lives; raise the error to any other caller.

    A schedule that fires again too early is no failure: what goes on does all there is to do.
    """
    if not deployment.id:
        raise error
    run_logger().info("%s", error)
    summary = summarize(open_store(store_uri), series, "already-running", str(error))
    return named(state_name(summary.outcome), summary, summary.reason)


def tell_outcome(summary: RetrainSummary) -> RetrainSummary:
    """Log and show what a retrain came to, and return it as the flow's final state, named for it."""
    run_logger().info("Series %s: %s: %s", summary.series, summary.outcome, summary.reason)
    events.emit("retrained", series=summary.series, outcome=summary.outcome, reason=summary.reason)
    publish_markdown(f"retrain-{summary.series}", retrain_markdown(summary), f"Latest retrain of {summary.series}")
    return named(state_name(summary.outcome), summary, summary.reason)


def retrain_markdown(summary: RetrainSummary) -> str:
    """Return the decision as Markdown."""
    scores = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in summary.scores.items()}
    rows = {
        "outcome": f"**{summary.outcome}**: {summary.reason}",
        "champion now": summary.champion_uri,
        "candidate": summary.candidate_uri,
        "validation loss of the candidate": scores.get("candidate_loss"),
        "of the champion, on the same held-out set": scores.get("champion_loss"),
        "score of the candidate": scores.get("candidate_score"),
        "score of the champion": scores.get("champion_score"),
        "gate": scores.get("gate"),
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
        lines += ["", f"To take the promotion back: `relora promote {summary.series} --rollback`"]
    elif summary.candidate_uri:
        lines += ["", f"To promote it all the same: `relora promote {summary.series} {summary.candidate_uri}`"]
    return "\n".join(lines)
