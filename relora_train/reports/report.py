"""The report of a run: one self-contained HTML file, its figures as PNG files, and the same numbers as JSON.

The same RunData gives the same bytes. Nothing is loaded from elsewhere: no script, font, style or image. Infinite and
NaN numbers are shown as such in HTML and become null in JSON.
"""

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.reports.collect import collect_run_data
from relora_train.reports.plot_style import MAX_POINTS
from relora_train.reports.plots import draw_plots, loss_ceiling, overview_png, score_plot_name
from relora_train.reports.ranks.layers import natural_order
from relora_train.reports.ranks.measures import PAPER_THRESHOLD, json_value
from relora_train.reports.render import TEMPLATES, render
from relora_train.reports.run_data import RunData
from relora_train.reports.sources import left_out_of, sources_read
from relora_train.reports.text import change, headline_text, score, scores_change
from relora_train.runs.task_scores import recorded_task_scores
from relora_train.settings.objectives import LOSS
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store
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
    fetch = files_in_stores(checkpoint_cache(run_id))
    scores = recorded_task_scores(open_store(line[-1].store_uri), line)
    data = collect_run_data(line, fetch, evaluations=evaluations, task_scores=scores)
    data = replace(data, sources=sources_read(line[-1], fetch), left_out=left_out_of(line[-1], fetch))
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
    copied = (
        "run_id", "profile", "method", "dataset_id", "dataset_uri", "spectra_between", "spectra_notes", "settings",
        "versions",
    )  # fmt: skip
    stages = [{**asdict(row), "steps": row.steps, "tokens_per_second": row.tokens_per_second} for row in data.stages]
    summary = {
        **{name: getattr(data, name) for name in copied},
        "finished_at": data.finished_at.isoformat(timespec="seconds"),
        "stages": stages,
        **{name: [asdict(row) for row in getattr(data, name)] for name in ("merges", "evaluations", "samples")},
        "task_scores": [dict(score) for score in data.task_scores],
        "sources": [asdict(row) for row in data.sources],
        "left_out": list(data.left_out),
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


def overview_markdown(data: RunData) -> str:
    """Return a heading, the result in one sentence, one figure as a data URL (below 60 kB) and the table of stages."""
    image = base64.b64encode(overview_png(data)).decode("ascii")
    alt = f"Training loss, learning rate and validation {data.measures.headline.name} by step"
    return (
        f"# {markdown_cell(data.run_id)}\n\n{markdown_cell(headline_text(data))}\n\n"
        f"![{alt}](data:image/png;base64,{image})\n\n{stage_table_markdown(data)}"
    )


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
        captions=_captions(data),
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
    since = change(base.after.of(headline), last.after.of(headline)) if base is not last else ""
    was = f"was {score(base.after, headline)}, {since}" if since else ""
    rate = tokens / seconds if tokens is not None and seconds > 0 else None
    shown = f"{len(data.stages)} stage{'s' if len(data.stages) > 1 else ''}"
    return [
        (f"Validation {headline.name}", score(last.after, headline), was),
        (second.name.capitalize(), score(last.after, second), f"after {last.stage}"),
        ("Steps", count(last.end_step - first.start_step), shown),
        ("Tokens", count(tokens), f"{count(rate)} per second" if rate is not None else ""),
        ("Merges", count(len(data.merges)), f"rank {count(last.rank)} each" if data.merges and last.rank else ""),
        ("Time", duration(seconds), "sum of the stages"),
    ]


def _captions(data: RunData) -> dict[str, tuple[str, str]]:
    """Return title and caption of each figure of the training, by file name."""
    drawn, bad = len(data.train), data.records_not_finite
    thinned = f" Of {count(drawn)} records at most {count(MAX_POINTS)} are drawn; each peak is kept."
    above = loss_ceiling(data) if drawn else None
    hidden = above is not None and bool((data.train["loss"] > above).any())
    loss = (
        "Faint: each record. Strong: running mean in a stage.",
        " Dashed lines are merges." if data.merges else "",
        f" The first steps lie above {decimal(above, 2)}, where the axis ends." if hidden else "",
        f" Records that are not finite, marked ×: {count(bad)}." if bad else "",
        thinned if drawn > MAX_POINTS else "",
    )
    return {
        "loss.png": ("Training loss", "".join(loss)),
        "learning_rate.png": ("Learning rate", "Warms up again after every merge." if data.merges else ""),
        score_plot_name(data): (
            f"Validation {data.measures.headline.name}",
            "The score of each checkpoint; values far above the rest are left out.",
        ),
        "gradient_norm.png": ("Gradient norm", "All trained parameters, and A and B by themselves."),
        "throughput.png": ("Tokens per second", "As recorded while training."),
    }
