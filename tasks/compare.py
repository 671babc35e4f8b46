"""The tasks of a comparison beside its runs: find those made before, record those that diverged, write the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect import task

from relora_train import events
from relora_train.errors import TrainerCrashedError
from relora_train.experiments import comparison, run_results
from relora_train.experiments.experiment import Experiment, PlannedRun
from relora_train.experiments.measured import MeasuredSummary, load_measured
from relora_train.experiments.records import ComparisonSummary, RunResult
from relora_train.experiments.report import measure, measured_markdown, store_comparison, store_measured
from relora_train.runs import task_scores
from relora_train.settings.objectives import OBJECTIVES
from relora_train.storage.opening import open_store
from tasks.artifacts import publish_markdown
from tasks.observe import forward_events, skipped
from tasks.policies import STORE_IO, TRAINING


@task(**STORE_IO, task_run_name="look-for-{run.run_id}")
def look_for_result(experiment: str, run: PlannedRun, store_uri: str) -> RunResult | None:
    """Return what is on record of a run that is finished or diverged, shown as Skipped; None for one to be run."""
    store = open_store(store_uri)
    found = run_results.find_result(store, run)
    if found is None and (message := run_results.recorded_divergence(store, experiment, run)):
        found = run_results.diverged_result(store, run, message)
    if found is None:
        return None
    key = OBJECTIVES[run.profile.objective].headline.key
    events.emit("arm_reused", arm=run.arm, seed=run.seed, outcome=found.outcome, **{key: getattr(found, key)})
    return skipped(found, run.run_id)


@task(**STORE_IO, task_run_name="result-of-{run.run_id}")
def read_result(run: PlannedRun, store_uri: str) -> RunResult:
    """Return what a run that has just ended well came to; it is scored first, if the experiment has a measure."""
    unscored = run_results.find_unscored(open_store(store_uri), run)
    if unscored is not None and run.measure is not None:
        task_scores.measured(unscored, run.measure, on_event=forward_events())
    found = run_results.find_result(open_store(store_uri), run)
    if found is None:
        raise TrainerCrashedError(
            f"Run {run.run_id} ended well, and {store_uri} holds no scores of its last checkpoint. Was it started with "
            "another store? Run the same command again."
        )
    return found


@task(**STORE_IO, task_run_name="diverged-{run.run_id}")
def keep_divergence(experiment: str, run: PlannedRun, message: str, store_uri: str) -> RunResult:
    """Write down that a run diverged, and return it as a result; the experiment goes on."""
    store = open_store(store_uri)
    run_results.record_divergence(store, experiment, run, message)
    events.emit("arm_diverged", arm=run.arm, seed=run.seed, message=message)
    return run_results.diverged_result(store, run, message)


@task(**STORE_IO, task_run_name="compare-{experiment.name}")
def write_comparison(
    experiment: Experiment, results: Sequence[RunResult], store_uri: str, *, reused: int
) -> ComparisonSummary:
    """Write the report to the store and the table as an artifact; return the ComparisonSummary."""
    compared = comparison.compare_results(experiment, results)
    summary = store_comparison(compared, open_store(store_uri), reused=reused)
    key, what = f"experiment-{experiment.name}", f"Report of experiment {experiment.name}: {summary.html_uri}"
    publish_markdown(key, comparison.comparison_markdown(compared), what)
    events.emit("compared", experiment=experiment.name, html_uri=summary.html_uri)
    return summary


@task(**TRAINING, task_run_name="measure-{experiment}")
def measure_experiment(
    experiment: str, overrides: Mapping[str, Any], seeds: Sequence[int] | None, store_uri: str
) -> MeasuredSummary:
    """Measure an experiment that trains no runs; its report goes to the store and its tables into an artifact."""
    planned = load_measured(experiment, overrides, seeds)
    measured, pictures = measure(planned)
    stored = store_measured(planned, measured, pictures, open_store(store_uri))
    what = f"Report of experiment {planned.name}: {stored.html_uri}"
    publish_markdown(f"experiment-{planned.name}", measured_markdown(planned, measured), what)
    events.emit("compared", experiment=planned.name, html_uri=stored.html_uri)
    return stored
