"""Retrain a series on its new data, and promote the result only if it is better."""

from __future__ import annotations

from contextlib import ExitStack, closing

from prefect import flow

from flows.parameters import Documents, LimitName, ProfileName, SeriesName, StoreUri, TaskDirectory
from flows.pretrain import train_stages
from relora_train.checkpoints.lease import hold_series
from relora_train.errors import RunInUseError
from relora_train.method.stages import stages_after
from relora_train.runs.retraining.interface import (
    Cycles,
    Margin,
    MarginKind,
    OldDataRatio,
    RetrainSummary,
    retrain_options,
    summarize,
)
from relora_train.runs.run import line_of, session
from relora_train.runs.task_scores import check_tasks
from relora_train.settings.load import load_profile
from relora_train.settings.overrides import ProfileOverrides
from relora_train.settings.tasks import TaskScore
from relora_train.storage.opening import open_store
from tasks.artifacts import name_flow_run
from tasks.limits import device_slot, require_limit
from tasks.observe import done
from tasks.presence import present
from tasks.run import check_model, evaluate_checkpoint, measure_by_task, write_report
from tasks.series import (
    begin_training,
    decide_promotion,
    look_for_new_data,
    tell_already_running,
    tell_outcome,
    tokenize_new_data,
)
from tasks.store import open_run_store


@flow(name="retrain", flow_run_name="retrain-{series}", persist_result=False)
def retrain(
    series: SeriesName,
    profile: ProfileName = "quickstart",
    overrides: ProfileOverrides | None = None,
    store: StoreUri | None = None,
    cycles: Cycles = 1,
    margin: Margin = 0.0,
    margin_kind: MarginKind = "relative",
    old_data_ratio: OldDataRatio = 0.25,
    fresh_warm_start: bool = False,
    retry_refused: bool = False,
    gate: TaskScore | None = None,
    gate_include: TaskDirectory | None = None,
    gate_limit: Documents | None = None,
    gpu_limit: LimitName | None = None,
) -> RetrainSummary:
    """Train a series' champion on what its source holds more than last time; promote the result if it is better.

    Ends as NoNewData, NotEnoughData, Promoted, Refused, Overtaken or, in a deployment, AlreadyRunning, all of them
    success. To be scheduled: a missed run costs nothing, a doubled one does nothing twice, a killed one is continued by
    the next.

    Args:
        series: name of the series; its first retrain trains the whole plan and is promoted as it is
        profile: name of a shipped profile, or path of a TOML file; its [data] is the source that grows
        overrides: settings over the profile, such as {"data": {"paths": ["s3://bucket/incoming/"]}}
        store: directory, file:// or s3://bucket/prefix; $RELORA_STORE, else ./relora-store, when absent
        cycles: cycles added to the champion's
        margin: by how much the validation loss must fall, or the gate's score rise
        margin_kind: relative to the champion's loss or score, or absolute
        old_data_ratio: share of the training text that is old data, mixed in against forgetting
        fresh_warm_start: train the whole plan anew on all data, instead of going on from the champion
        retry_refused: the data of a refused candidate stays new for the next retrain
        gate: TASK/METRIC of lm-evaluation-harness that decides in place of the loss; higher is better
        gate_include: directory of the worker's machine with YAML files of tasks of your own
        gate_limit: documents of the gate's task; all when absent
        gpu_limit: global concurrency limit of which the run holds one slot while it trains; none when absent
    """
    options = retrain_options(
        cycles=cycles,
        margin=margin,
        margin_kind=margin_kind,
        old_data_ratio=old_data_ratio,
        fresh_warm_start=fresh_warm_start,
        retry_refused=retry_refused,
        gate=gate,
        gate_include=gate_include,
        gate_limit=gate_limit,
    )
    if options.measure is not None:
        check_tasks(options.measure.selection)
    require_limit(gpu_limit)
    settings = load_profile(profile, overrides.model_dump() if overrides else {})
    store_uri = open_run_store(store)
    opened = open_store(store_uri)
    with ExitStack() as held:
        try:
            lease = held.enter_context(hold_series(opened, series))
        except RunInUseError as error:
            return tell_already_running(series, store_uri, error)
        held.enter_context(present())
        plan = look_for_new_data(series, store_uri, settings, options, lease)
        if plan is None:
            reason = "the source holds nothing that the series has not been trained on"
            return tell_outcome(summarize(opened, series, "no-new-data", reason))
        name_flow_run(series, plan.run_id)
        parent, depends_on = plan.parent, [plan.champion.uri] if plan.champion else ()
        stages = stages_after(plan.profile, parent.manifest if parent else None)
        with session(plan.run, depends_on=depends_on, stages=stages) as run:
            check_model(run, stages, parent)
            prepared = done(tokenize_new_data(run, plan))
            if prepared is None:
                reason = f"the {len(plan.new)} new parts of the source do not fill one update; they wait for more"
                return tell_outcome(summarize(opened, series, "not-enough-data", reason, plan=plan))
            begin_training(plan)
            with device_slot(gpu_limit), closing(run.worker):
                champion, measure = plan.champion, options.measure
                # Before the training: what is wrong with the gate is known then.
                their_score = measure_by_task(champion, measure) if champion and measure else None
                outcomes = train_stages(run, stages, prepared.dataset, parent)
                candidate = outcomes[-1].checkpoint
                our_score = measure_by_task(candidate, measure) if measure else None
                ours = done(evaluate_checkpoint(run, candidate, prepared.dataset)).record | {"gate_score": our_score}
                theirs = done(evaluate_checkpoint(run, champion, prepared.dataset)).record if champion else None
                theirs = theirs and theirs | {"gate_score": their_score}
            report = write_report(run, line_of(candidate, run=run)[-len(outcomes) - 1 :], [ours])
            decision = done(decide_promotion(plan, candidate, ours, theirs, prepared.dataset))
            made = {"candidate_uri": candidate.uri, "scores": decision.scores, "report_uri": report.html_uri}
            return tell_outcome(
                summarize(opened, series, decision.outcome, decision.reason, plan=plan, stages=outcomes, **made)
            )
