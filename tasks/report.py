"""Write the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task

from relora_train import events
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.reports.report import StoredReport, report_run
from relora_train.runs.run import Run
from tasks.artifacts import publish_markdown
from tasks.policies import STORE_IO


@task(**STORE_IO, task_run_name="report-{run.run_id}")
def write_report(run: Run, line: Sequence[CheckpointRef], evaluations: Sequence[dict[str, Any]]) -> StoredReport:
    """Write HTML, plots and summary to the store, and table and plot as an artifact; return the StoredReport."""
    report = report_run(line, evaluations, run.store, run.run_id)
    publish_markdown(f"report-{run.run_id}", report.markdown, f"Report of run {run.run_id}: {report.html_uri}")
    events.emit("report_written", html_uri=report.html_uri)
    return report
