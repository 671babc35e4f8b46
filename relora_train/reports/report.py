"""The report of a run: one self-contained HTML file, its figures as PNG files, and the same numbers as JSON.

The same RunData gives the same bytes. Nothing is loaded from elsewhere: no script, font, style or image. Infinite and
NaN numbers are shown as such in HTML and become null in JSON.
"""

import base64
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.errors import ConfigError
from relora_train.reports.collect import collect_run_data
from relora_train.reports.plots import draw_plots, overview_png
from relora_train.reports.ranks.layers import natural_order
from relora_train.reports.ranks.measures import PAPER_THRESHOLD, json_value
from relora_train.reports.relatives import relatives_of
from relora_train.reports.render import TEMPLATES, printable, render
from relora_train.reports.run_data import RunData
from relora_train.reports.sources import data_read, left_out_of
from relora_train.reports.text import change, final_evaluation, headline_text, score, scores_change
from relora_train.reports.training_charts import training_charts
from relora_train.reports.work import wall_time_text
from relora_train.runs.task_scores import recorded_task_scores
from relora_train.settings.objectives import LOSS
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import checkpoint_cache
from relora_train.text import MISSING, count, decimal, duration, markdown_cell, markdown_table, steps_text

LINK_VARIABLE = "RELORA_REPORT_LINK_HOURS"
HTML_NAME = "report.html"
SUMMARY_NAME = "summary.json"
OVERVIEW_NAME = "overview.png"


_SAMPLES_SHOWN, _SAMPLE_CHARACTERS = 3, 600
_SNAPSHOT_UNITS = {"every_steps": "steps", "every_seconds": "seconds"}


@dataclass(frozen=True)
class StoredReport:
    """The place of a report, and its content in short."""

    html_uri: str
    picture_uris: tuple[str, ...]
    summary: dict[str, Any]
    markdown: str
    link: str | None = None
    """An address that opens the page for $RELORA_REPORT_LINK_HOURS, if that is set and the store is S3."""


def report_run(
    line: Sequence[CheckpointRef], evaluations: Sequence[dict[str, Any]], store: ObjectStore, run_id: str
) -> StoredReport:
    """Write the report of a line of checkpoints to runs/<run_id>/report/ of the store; one from before is replaced."""
    prefix, data = report_prefix(run_id), read_run(line, evaluations, run_id)
    with tempfile.TemporaryDirectory(prefix="relora-report-") as scratch:
        written = write_report(data, Path(scratch))
        for path in written:  # the page last
            store.put_file(f"{prefix}/{path.name}", path)
        overview = (Path(scratch) / OVERVIEW_NAME).read_bytes()
    hours = link_hours()
    link = store.page_link(f"{prefix}/{HTML_NAME}", round(hours * 3600)) if hours else None
    opens = (
        f"[Open the report]({link}), for {hours:g} hours from {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. " if link else ""
    )
    html_uri = f"{store.uri}/{prefix}/{HTML_NAME}"
    place = f"{opens}Report: `{markdown_cell(html_uri, code=True)}`\n\n"
    return StoredReport(
        html_uri=html_uri,
        picture_uris=tuple(f"{store.uri}/{prefix}/{path.name}" for path in written if path.suffix == ".png"),
        summary=summarize(data),
        markdown=overview_markdown(data, overview, place),
        link=link,
    )


def link_hours() -> float | None:
    """Return for how long a link to a report is to open, by $RELORA_REPORT_LINK_HOURS; None to make none."""
    text = os.environ.get(LINK_VARIABLE, "")
    if not text:
        return None
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours <= 168:
        raise ConfigError(
            f"{LINK_VARIABLE}={text!r} must be a number of hours, 168 (a week) at most; unset it for none."
        )
    return hours


def report_prefix(run_id: str) -> str:
    """Return the place of a run's reports in its store."""
    return f"runs/{check_run_id(run_id)}/report"


def read_run(
    line: Sequence[CheckpointRef], evaluations: Sequence[dict[str, Any]], run_id: str, *, spectra: bool = True
) -> RunData:
    """Return all that a report shows of a line of checkpoints, from the stores that hold it."""
    fetch, store = files_in_stores(checkpoint_cache(run_id)), open_store(line[-1].store_uri)
    scores = recorded_task_scores(store, line)
    data = collect_run_data(line, fetch, evaluations=evaluations, task_scores=scores, spectra=spectra)
    told, relatives = data_read(line[-1], fetch), relatives_of(store, line, run_id)
    return replace(data, **told, left_out=left_out_of(line[-1], fetch), relatives=relatives)


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
    copied = (
        "run_id", "profile", "method", "dataset_id", "dataset_uri", "spectra_between", "spectra_notes", "settings",
        "versions",
    )  # fmt: skip
    stages = [
        {
            **asdict(row),
            "steps": row.steps,
            "tokens_per_second": row.tokens_per_second,
            "work": row.work and row.work.record(),
        }
        for row in data.stages
    ]
    summary = {
        **{name: getattr(data, name) for name in copied},
        "finished_at": data.finished_at.isoformat(timespec="seconds"),
        "stages": stages,
        **{name: [asdict(row) for row in getattr(data, name)] for name in ("merges", "evaluations", "samples")},
        "task_scores": [dict(score) for score in data.task_scores],
        "sources": [asdict(row) for row in data.sources],
        "left_out": list(data.left_out),
        "data": dict(data.data_facts),
        "relatives": [asdict(row) for row in data.relatives],
        "spectra": [spectrum.record() for spectrum in data.spectra],
        "cycle_history": data.history and data.history.record(),
        "train_records": len(data.train),
        "train_records_not_finite": data.records_not_finite,
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


def overview_markdown(data: RunData, overview: bytes, place: str = "") -> str:
    """Return heading, result, place, one figure as a data URL (below 60 kB), stages, evaluations and samples."""
    image = base64.b64encode(overview).decode("ascii")
    alt = f"Training loss, learning rate and validation {data.measures.headline.name} by step"
    return (
        f"# {markdown_cell(data.run_id)}\n\n{markdown_cell(headline_text(data))}\n\n{place}"
        f"![{alt}](data:image/png;base64,{image})\n\n{stage_table_markdown(data)}{_evaluation_markdown(data)}"
    )


def _evaluation_markdown(data: RunData) -> str:
    """Return a Markdown table of the evaluations, and what the last checkpoint's model writes as blocks of code."""
    measures, parts = data.measures, list[str]()
    if data.evaluations:
        shown = (measures.headline, measures.second)
        header = ("Evaluation of", "Step", *(one.name.capitalize() for one in shown), f"Held-out {measures.unit}s")
        rows = (
            (item.stage, count(item.step), *(score(item.scores, one) for one in shown), count(item.val_tokens))
            for item in data.evaluations
        )
        parts.append("\n".join(markdown_table(header, rows)))
    last = data.stages[-1]
    for sample in [one for one in data.samples if one.step == last.end_step][:_SAMPLES_SHOWN]:
        lines = printable(sample.prompt + sample.text)[:_SAMPLE_CHARACTERS].splitlines()
        parts.append(f"After {markdown_cell(last.stage)} the model writes:")
        parts.append("\n".join(f"    {line}" for line in lines))
    return "".join(f"\n{part}\n" for part in parts)


def render_page(data: RunData, pictures: Mapping[str, bytes]) -> str:
    """Return the whole page. pictures: PNG bytes by name."""
    ranks = [row.rank for row in data.stages if row.rank is not None]
    moments = sorted({(sample.step, sample.stage) for sample in data.samples})
    measures = data.measures
    return render(
        TEMPLATES / "run.html",
        data=data,
        pictures=pictures,
        method={"relora": "ReLoRA", "lora": "LoRA", "full": "full rank"}.get(data.method, data.method),
        tiles=_tiles(data),
        charts=training_charts(data),
        facts=_facts(data),
        scored=list(dict.fromkeys((LOSS, measures.headline, measures.second))),
        merged_layers=sorted({name for row in data.merges for name in row.layers}, key=natural_order),
        cycle_rank=ranks[-1] if ranks else None,
        threshold=PAPER_THRESHOLD,
        moments=moments if len(moments) < 2 else [moments[0], moments[-1]],
        sample_texts={(sample.step, sample.stage, sample.prompt): sample.text for sample in data.samples},
        settings_json=json.dumps(data.settings, indent=2, ensure_ascii=False, default=str),
    )


def _tiles(data: RunData) -> list[tuple[str, str, str]]:
    first, last = data.stages[0], data.stages[-1]
    seconds = sum(row.seconds for row in data.stages)
    tokens = None if any(row.tokens is None for row in data.stages) else sum(row.tokens or 0 for row in data.stages)
    base = next((row for row in data.stages if row.stage == "warm-start"), first)
    headline, second = data.measures.headline, data.measures.second
    final = final_evaluation(data)
    scores = final.scores if final else last.after
    since = change(base.after.of(headline), last.after.of(headline)) if base is not last else ""
    beside = (
        [f"in training {score(last.after, one)}" for one in (headline, second)]
        if final
        else [f"{since} since {base.stage}" if since else "", f"after {last.stage}"]
    )
    rate = tokens / seconds if tokens is not None and seconds > 0 else None
    shown = f"{len(data.stages)} stage{'s' if len(data.stages) > 1 else ''}"
    return [
        (f"Validation {headline.name}", score(scores, headline), beside[0]),
        (second.name.capitalize(), score(scores, second), beside[1]),
        ("Steps", count(last.end_step - first.start_step), shown),
        ("Tokens", count(tokens), f"{count(rate)} per second" if rate is not None else ""),
        ("Merges", count(len(data.merges)), f"rank {count(last.rank)} each" if data.merges and last.rank else ""),
        ("Time", duration(seconds), "sum of the stages"),
    ]


def _facts(data: RunData) -> list[tuple[str, str]]:
    """Return what the manifests of the run's own stages tell of who trained them and how long it took."""
    own = [row for row in data.stages if row.run_id == data.run_id]
    told = [row.work.provenance for row in own if row.work is not None]

    def of(key: str) -> str:
        return "\n".join(dict.fromkeys(one[key] for one in told if key in one)) or MISSING

    snapshots = data.settings.get("snapshots", {})
    every = [f"every {snapshots[key]:,g} {unit}" for key, unit in _SNAPSHOT_UNITS.items() if snapshots.get(key)]
    return [
        ("Wall time", wall_time_text(own)),
        ("Snapshots", " or ".join(every) or MISSING),
        ("Command", of("command")),
        ("Commit", of("commit")),
        ("Flow run", of("prefect_flow_run_id")),
    ]
