"""Pretrain a model with ReLoRA: tokenize, warm start, one cycle at a time, evaluate, report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from prefect import flow

from flows.parameters import CheckpointName, LimitName, ProfileName, RunId, StageName, StoreUri
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.method.stages import Stage, stages_after, until
from relora_train.runs.evaluations import recorded_evaluations
from relora_train.runs.run import (
    DatasetRef,
    Run,
    RunSummary,
    StageOutcome,
    choose_run_id,
    first_and_last,
    line_of,
    line_to_head,
    session,
    summarize_run,
)
from relora_train.settings.load import load_profile
from relora_train.settings.overrides import ProfileOverrides
from tasks.artifacts import name_flow_run
from tasks.limits import device_slot, require_limit
from tasks.observe import done
from tasks.presence import present
from tasks.run import check_model, evaluate_checkpoint, load_report, tokenize, write_report
from tasks.store import open_run_store, resolve_parent
from tasks.train import store_checkpoint, train_cycle, warm_start


@flow(name="pretrain", flow_run_name="pretrain-{profile}", persist_result=False)
def pretrain(
    profile: ProfileName = "quickstart",
    overrides: ProfileOverrides | None = None,
    run_id: RunId | None = None,
    store: StoreUri | None = None,
    resume_from: CheckpointName | None = None,
    gpu_limit: LimitName | None = None,
    stop_after: StageName | None = None,
) -> RunSummary:
    """Bring a run to its end from wherever it stands; stages that are committed already are skipped.

    One flow a run at a time: a second one fails with RunInUseError while the first lives.

    Args:
        profile: name of a shipped profile, or path of a TOML file
        overrides: settings over the profile; what is absent stays the profile's
        run_id: name of the run; the same name continues it; derived from the settings when absent
        store: directory, file:// or s3://bucket/prefix; $RELORA_STORE, else ./relora-store, when absent
        resume_from: checkpoint to start from: RUN@cycle-2, RUN@latest, or a URI in any store
        gpu_limit: global concurrency limit of which the run holds one slot while it trains; none when absent
        stop_after: the last stage to be trained, such as warm-start; the plan's last when absent
    """
    settings = load_profile(profile, overrides.model_dump() if overrides else {})
    require_limit(gpu_limit)
    store_uri = open_run_store(store)
    parent = resolve_parent(resume_from, store_uri) if resume_from else None
    run_id = run_id or choose_run_id(settings, parent)
    name_flow_run(settings.name, run_id)
    planned = stages_after(settings, parent.manifest if parent else None)
    stages = until(stop_after, planned)
    identity = Run(run_id, store_uri, settings, branches=parent is not None)
    with present(), session(identity, depends_on=[parent.uri] if parent else (), stages=stages) as run:
        check_model(run, planned, parent)
        prepared = done(tokenize(run, parent))
        with device_slot(gpu_limit), closing(run.worker):
            load_report()
            outcomes = train_stages(run, stages, prepared.dataset, parent)
            line = line_of(outcomes[-1].checkpoint if outcomes else parent, run=run)
            evaluations = [done(evaluate_checkpoint(run, ref, prepared.dataset)) for ref in first_and_last(line)]
        whole = line_to_head(run, line)
        later = whole[len(line) :]
        records = [evaluation.record for evaluation in evaluations] + recorded_evaluations(run.store, later)
        report = write_report(run, whole, records)
        pictures = report.picture_uris
        return summarize_run(
            run, prepared, outcomes, evaluations, later, report_uri=report.html_uri, picture_uris=pictures
        )


def train_stages(
    run: Run, stages: Sequence[Stage], dataset: DatasetRef, parent: CheckpointRef | None
) -> list[StageOutcome]:
    """Train each stage from the one before; all of them are stored when this returns.

    A run with a publisher stores one while the next trains, never more: the next is handed over, and the one after it
    begun, when this one's turn to be stored is over. A trained stage is stored, also when the next one fails.
    """

    def stored(outcomes: list[StageOutcome]) -> list[StageOutcome]:
        return [outcome if outcome.stored else store_checkpoint(run, outcome) for outcome in outcomes]

    outcomes: list[StageOutcome] = []
    for stage in stages:
        train = train_cycle if stage.low_rank else warm_start
        try:
            outcome = done(train(run, stage, dataset, parent))
        except Exception:
            stored(outcomes)
            raise
        outcomes = [*stored(outcomes), outcome]
        parent = outcome.checkpoint
    run.worker.dismiss(run.profile)
    return stored(outcomes)
