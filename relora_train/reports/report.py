"""The report of a run: one self-contained HTML file, its figures as PNG files, and the same numbers as JSON.

The same RunData gives the same bytes. Nothing is loaded from elsewhere: no script, font, style or image. Infinite and
NaN numbers are shown as such in HTML and become null in JSON. Imports no torch.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.reports.collect import collect_run_data
from relora_train.reports.page import render_page
from relora_train.reports.plots import draw_plots, overview_png
from relora_train.reports.records import history_record, json_value, spectrum_record
from relora_train.reports.run_data import RunData
from relora_train.reports.text import headline_text, scores_change
from relora_train.storage.base import ObjectStore
from relora_train.storage.workspace import checkpoint_cache
from relora_train.text import count, decimal, duration, markdown_cell, steps_text

HTML_NAME = "report.html"
SUMMARY_NAME = "summary.json"
OVERVIEW_NAME = "overview.png"


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
        written = write_report(data, Path(scratch))
        for path in written:  # the page last
            store.put_file(f"{prefix}/{path.name}", path)
    return StoredReport(
        html_uri=f"{store.uri}/{prefix}/{HTML_NAME}",
        picture_uris=tuple(f"{store.uri}/{prefix}/{path.name}" for path in written if path.suffix == ".png"),
        summary=summarize(data),
        markdown=overview_markdown(data),
    )


def write_report(data: RunData, output_dir: Path) -> list[Path]:
    """Write overview.png, the figures, summary.json and report.html; files of an earlier report are replaced."""
    output_dir.mkdir(parents=True, exist_ok=True)
    pictures = draw_plots(data)
    summary = json.dumps(summarize(data), indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    page = render_page(data, pictures)
    contents = {OVERVIEW_NAME: overview_png(data), **pictures, SUMMARY_NAME: summary.encode(), HTML_NAME: page.encode()}
    for name, content in contents.items():
        (output_dir / name).write_bytes(content)
    return [output_dir / name for name in contents]


def summarize(data: RunData) -> dict[str, Any]:
    """Return the report's numbers as JSON values; a number that is not finite is None."""
    summary = {
        "run_id": data.run_id,
        "profile": data.profile,
        "method": data.method,
        "finished_at": data.finished_at.isoformat(timespec="seconds"),
        "dataset_id": data.dataset_id,
        "dataset_uri": data.dataset_uri,
        "stages": [
            {**asdict(row), "steps": row.steps, "tokens_per_second": row.tokens_per_second} for row in data.stages
        ],
        "merges": [asdict(row) for row in data.merges],
        "evaluations": [asdict(item) for item in data.evaluations],
        "samples": [asdict(sample) for sample in data.samples],
        "spectra_between": data.spectra_between,
        "spectra": [spectrum_record(spectrum) for spectrum in data.spectra],
        "cycle_history": None if data.history is None else history_record(data.history),
        "spectra_notes": data.spectra_notes,
        "train_records": len(data.train),
        "train_records_not_finite": data.train.not_finite,
        "settings": data.settings,
        "versions": data.versions,
    }
    return {key: json_value(value) for key, value in summary.items()}


def stage_table_markdown(data: RunData) -> str:
    """Return a Markdown table with one row a stage, then the checkpoints' URIs. No value can break out."""
    headline, second = data.measures.headline, data.measures.second
    scored = (f"Validation {headline.name}", second.name.capitalize())
    header = ("Stage", "Steps", "Tokens", *scored, "Time", "Tokens/s", "Checkpoint")
    lines = [f"| {' | '.join(header)} |", "|:--|--:|--:|--:|--:|--:|--:|:--|"]
    for row in data.stages:
        name = row.uri.rstrip("/").rpartition("/")[2]  # in full it would not fit beside the numbers
        cells = (
            row.stage,
            steps_text(row.start_step, row.end_step),
            count(row.tokens),
            scores_change(row, headline),
            scores_change(row, second),
            duration(row.seconds),
            decimal(row.tokens_per_second, 0),
        )
        lines.append(f"| {' | '.join(map(markdown_cell, cells))} | `{markdown_cell(name, code=True)}` |")
    places = [f"- {markdown_cell(row.stage)}: `{markdown_cell(row.uri, code=True)}`" for row in data.stages]
    return "\n".join([*lines, "", *places]) + "\n"


def overview_markdown(data: RunData) -> str:
    """Return a heading, the result in one sentence, one figure as a data URL (below 60 kB) and the table of stages."""
    image = base64.b64encode(overview_png(data)).decode("ascii")
    alt = f"Training loss, learning rate and validation {data.measures.headline.name} by step"
    return (
        f"# {markdown_cell(data.run_id)}\n\n{markdown_cell(headline_text(data))}\n\n"
        f"![{alt}](data:image/png;base64,{image})\n\n{stage_table_markdown(data)}"
    )
