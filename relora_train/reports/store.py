"""Put a run's report beside the run in its store."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.reports.collect import collect_run_data
from relora_train.reports.report import overview_markdown, summarize, write_report
from relora_train.storage.base import ObjectStore
from relora_train.storage.workspace import checkpoint_cache


@dataclass(frozen=True)
class StoredReport:
    """The place of a report, and its content in short."""

    html_uri: str
    picture_uris: tuple[str, ...]
    summary: dict[str, Any]
    markdown: str


def report_run(
    line: Sequence[CheckpointRef], evaluations: Sequence[dict[str, Any]], store: ObjectStore, run_id: str
) -> StoredReport:
    """Write the report of a line of checkpoints to runs/<run_id>/report/ of the store; one from before is replaced."""
    prefix = f"runs/{check_run_id(run_id)}/report"
    data = collect_run_data(line, files_in_stores(checkpoint_cache(run_id)), evaluations=evaluations)
    with tempfile.TemporaryDirectory(prefix="relora-report-") as scratch:
        files = write_report(data, Path(scratch))
        for path in (*files.pngs, files.summary_json, files.html):
            store.put_file(f"{prefix}/{path.name}", path)
    return StoredReport(
        html_uri=f"{store.uri}/{prefix}/{files.html.name}",
        picture_uris=tuple(f"{store.uri}/{prefix}/{path.name}" for path in files.pngs),
        summary=summarize(data),
        markdown=overview_markdown(data),
    )
