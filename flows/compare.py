"""Run an experiment: every arm at every seed, then one table with errors and one report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefect import flow

from flows.parameters import ExperimentName, LimitName, PretrainDeployment, Seeds, StoreUri
from flows.pretrain import pretrain
from relora_train import events
from relora_train.errors import DivergedError
from relora_train.experiments.experiment import Experiment, PlannedRun, load_experiment
from relora_train.experiments.measured import MeasuredSummary, is_measured
from relora_train.experiments.records import ComparisonSummary, RunResult
from relora_train.runs.model_check import check_settings
from relora_train.runs.task_scores import check_tasks
from relora_train.settings.overrides import ExperimentOverrides
from tasks.alone import call_flow
from tasks.compare import keep_divergence, look_for_result, measure_experiment, read_result, write_comparison
from tasks.deployed import require_deployment, run_deployed
from tasks.limits import device_slot, require_limit
from tasks.observe import done
from tasks.store import open_run_store


@flow(name="compare", flow_run_name="compare-{experiment}", persist_result=False)
def compare(
    experiment: ExperimentName,
    overrides: ExperimentOverrides | None = None,
    seeds: Seeds | None = None,
    store: StoreUri | None = None,
    deployment: PretrainDeployment | None = None,
    gpu_limit: LimitName | None = None,
) -> ComparisonSummary | MeasuredSummary:
    """Bring every run of an experiment to its end from wherever it stands, and compare them.

    Each is an ordinary run of the flow pretrain; a warm start that several begin with is trained once. A run that
    diverges is a result. Recorded results are reused, so the same call goes on after any interruption. An experiment
    that trains no runs (the tutorial, table 4) is measured anew, here.

    Args:
        experiment: name of a shipped experiment, or path of a TOML file
        overrides: settings over its base profile, for every arm; of one without runs over its own
        seeds: instead of the experiment's
        store: directory, file:// or s3://bucket/prefix; $RELORA_STORE, else ./relora-store, when absent
        deployment: deployment of pretrain that makes the runs, side by side; one after another, here, when absent
        gpu_limit: global concurrency limit of which each run holds one slot while it trains; none when absent
    """
    given = overrides.model_dump() if overrides else {}
    if is_measured(experiment):
        return measure_experiment(experiment, given, seeds, open_run_store(store))
    planned = load_experiment(experiment, given, seeds)
    require_limit(gpu_limit)
    require_deployment(deployment)
    if measure := planned.runs[0].measure:
        check_tasks(measure.selection)
    for run in planned.runs:  # of every arm, before the warm start that they share
        check_settings(run.profile)
    store_uri = open_run_store(store)
    results = {run.run_id: done(look_for_result(planned.name, run, store_uri)) for run in planned.runs}
    missing = [run for run in planned.runs if results[run.run_id] is None]
    lost: dict[str, str] = {}
    for wave in planned.waves(missing, together=deployment is not None):
        for run, message in _ends(planned, wave, lost, store_uri, deployment, gpu_limit):
            if run.is_warm_start:
                lost |= {run.run_id: message} if message else {}
            elif message:
                results[run.run_id] = keep_divergence(planned.name, run, message, store_uri)
            else:
                with device_slot(gpu_limit if run.measure else None):
                    results[run.run_id] = read_result(run, store_uri)
    found: list[RunResult] = [result for result in results.values() if result is not None]
    return write_comparison(planned, found, store_uri, reused=len(planned.runs) - len(missing))


def _ends(
    planned: Experiment,
    wave: Sequence[PlannedRun],
    lost: dict[str, str],
    store_uri: str,
    deployment: str | None,
    gpu_limit: str | None,
) -> Iterator[tuple[PlannedRun, str | None]]:
    """Yield each run of a wave when it has ended, with a message if it, or its warm start, diverged."""
    runs = {run.run_id: run for run in wave if run.warm_start not in lost}
    parameters = {name: planned.parameters(run, store_uri=store_uri, gpu_limit=gpu_limit) for name, run in runs.items()}
    for run in wave:
        if run.warm_start in lost:
            yield run, lost[run.warm_start]
    if deployment is not None:
        for name, error in run_deployed(deployment, parameters):
            yield runs[name], str(error) if error else None
        return
    for name, run in runs.items():
        stages = [stage.name for stage in run.stages]
        events.emit("arm_started", arm=run.arm, seed=run.seed, run_id=name, stages=stages)
        try:
            call_flow(pretrain, parameters[name])
        except DivergedError as error:
            yield run, str(error)
        else:
            yield run, None
