"""The HTML page of a report: its sections and what they say. Its own content policy forbids scripts and anything loaded
from elsewhere; escaping is in html.py."""

from __future__ import annotations

import json
from collections.abc import Sequence

from relora_train.reports.html import Cell, Html, details, escape, figure, note, table
from relora_train.reports.plot_style import MAX_POINTS
from relora_train.reports.plots import loss_ceiling, score_plot_name
from relora_train.reports.rank_sections import Pictures, rank_sections
from relora_train.reports.ranks.layers import natural_order
from relora_train.reports.run_data import RunData, Sample, StageRow
from relora_train.reports.style import STYLE
from relora_train.reports.text import (
    change,
    count,
    decimal,
    duration,
    headline,
    percent,
    scientific,
    score,
    scores_change,
    size,
    stage_steps,
)
from relora_train.runs.divergence import divergence_text
from relora_train.settings.measures import LOSS, Measure


def render_page(data: RunData, pictures: Pictures) -> str:
    """The whole page; the same input gives the same text."""
    sections = [
        ("stages", "Stages", _stages(data)),
        ("training", "Training", _training(data, pictures)),
        ("merges", "Merges", _merges(data)),
        ("spectra", "Rank of the total update", rank_sections(data, pictures)),
        ("evaluation", "Evaluation", _evaluations(data)),
        ("samples", "Samples", _samples(data.samples)),
        ("lineage", "Lineage", _lineage(data)),
        ("settings", "Settings and versions", _settings(data)),
    ]
    tiles = Html(f'<div class="tiles">{"".join(_tile(*tile) for tile in _tiles(data))}</div>')
    return page(data.run_id, Html(f"{_header(data)}\n{tiles}"), sections)


def page(title: str, header: Html, sections: Sequence[tuple[str, str, Html]]) -> str:
    """A whole page of sections, given as anchor, heading and content. It may load nothing and run nothing."""
    links = " ".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in sections)
    body = "\n".join(f'<section id="{key}"><h2>{escape(name)}</h2>\n{text}</section>' for key, name, text in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} · ReLoRA Train</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{header}\n<nav>{links}</nav>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(data: RunData) -> Html:
    method = {"relora": "ReLoRA", "lora": "LoRA", "full": "full rank"}.get(data.method, data.method)
    facts = f"profile {data.profile} · method {method} · last checkpoint {data.finished_at:%Y-%m-%d %H:%M} UTC"
    return Html(
        f'<header><p class="eyebrow">ReLoRA Train</p><h1>{escape(data.run_id)}</h1>'
        f'<p class="lede">{escape(headline(data))}</p><p class="facts">{escape(facts)}</p></header>'
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


def _tile(title: str, value: str, note: str) -> Html:
    return Html(
        f'<div class="tile"><span>{escape(title)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
    )


def _stages(data: RunData) -> Html:
    headline, second = data.measures.headline, data.measures.second
    header = ("Stage", "Steps", "Tokens", f"Val. {headline.name}", "", second.name.capitalize(), "Time", "Tokens/s")
    rows: list[Sequence[Cell]] = []
    for row in data.stages:
        origin = "" if row.run_id == data.run_id else f"from run {row.run_id} · "
        rows.append(
            (
                row.stage,
                stage_steps(row),
                count(row.tokens),
                scores_change(row, headline),
                _change_cell(row, headline),
                scores_change(row, second),
                duration(row.seconds),
                count(row.tokens_per_second),
            )
        )
        rows.append((Html(f"{escape(origin)}<code>{escape(row.uri)}</code>"),))
    text = (
        f"{headline.name.capitalize()} and {second.name} on held-out {data.measures.held_out}, before → after the "
        "stage. Tokens/s over the whole stage."
    )
    lowered = [note(f"{row.stage} {divergence_text(row.divergence)}.") for row in data.stages if row.divergence]
    return Html(table(header, rows) + note(text) + "".join(lowered))


def _change_cell(row: StageRow, measure: Measure) -> Html:
    text = change(row.before.of(measure), row.after.of(measure))
    kind = "better" if text.startswith("−") != measure.higher_is_better else "worse"
    return Html(f'<span class="{kind}">{escape(text)}</span>' if text else "")


def _training(data: RunData, pictures: Pictures) -> Html:
    if not len(data.train):
        return note("These checkpoints hold no training records.")
    thinned = (
        f" Of {count(len(data.train))} records at most {count(MAX_POINTS)} are drawn; each peak is kept."
        if len(data.train) > MAX_POINTS
        else ""
    )
    bad = data.train.not_finite
    odd = f" Records that are not finite, marked ×: {count(bad)}." if bad else ""
    merges = " Dashed lines are merges." if data.merges else ""
    above = loss_ceiling(data)
    hidden = above is not None and bool((data.train["loss"] > above).any())
    cut = f" The first steps lie above {decimal(above, 2)}, where the axis ends." if hidden else ""
    loss = f"Faint: each record. Strong: running mean in a stage.{merges}{cut}{odd}{thinned}"
    captions = {
        "loss.png": ("Training loss", loss),
        "learning_rate.png": ("Learning rate", "Warms up again after every merge." if data.merges else ""),
        score_plot_name(data): (
            f"Validation {data.measures.headline.name}",
            "Of each checkpoint; values far above the rest are left out.",
        ),
        "gradient_norm.png": ("Gradient norm", "Of all trained parameters, and of A and B."),
        "throughput.png": ("Tokens per second", "As recorded while training."),
    }
    shown = [figure(pictures[name], *caption) for name, caption in captions.items() if name in pictures]
    return Html("".join(shown))


def _merges(data: RunData) -> Html:
    if not data.merges:
        return note("No low-rank update was merged in these stages.")
    header = ("Merge", "Step", "Output change", "‖ΔW‖ / ‖W‖", "Effective rank", "Optimizer state zeroed")
    rows = [
        (
            row.stage,
            count(row.step),
            scientific(row.max_relative_output_change),
            percent(row.relative_update_norm, 2),
            decimal(row.effective_rank, 1),
            percent(row.optimizer_state_zeroed),
        )
        for row in data.merges
    ]
    text = (
        "A merge must leave the model's output as it was: output change is the largest relative difference on a probe "
        "batch, which is rounding. ‖ΔW‖ / ‖W‖ and effective rank, exp(entropy of the singular values), describe the "
        "update that was merged; the rank is a mean over layers."
    )
    return Html(table(header, rows) + note(text) + _merged_layers(data))


def _merged_layers(data: RunData) -> Html:
    names = sorted({name for row in data.merges for name in row.layers}, key=natural_order)
    if not names:
        return Html("")
    header = ("Layer", *(row.stage for row in data.merges))
    rows = []
    for name in names:
        layers = [row.layers.get(name, {}) for row in data.merges]
        cells = [f"{percent(x.get('relative_update_norm'), 2)} · {decimal(x.get('effective_rank'), 1)}" for x in layers]
        rows.append((name, *cells))
    return details("Layer by layer: ‖ΔW‖ / ‖W‖ · effective rank", table(header, rows), printed=False)


def _evaluations(data: RunData) -> Html:
    if not data.evaluations:
        return note(
            "The evaluation task has not scored these checkpoints; the table of stages has the trainer's scores."
        )
    measures = data.measures
    shown = dict.fromkeys((LOSS, measures.headline, measures.second))
    rows: list[Sequence[Cell]] = []
    for item in data.evaluations:
        scores = [score(item.scores, measure) for measure in shown]
        rows.append((item.stage, count(item.step), count(item.val_tokens), *scores))
        rows.append((Html(f"<code>{escape(item.checkpoint_uri)}</code>"),))
    header = ("Checkpoint", "Step", f"Held-out {measures.unit}s", *(measure.name.capitalize() for measure in shown))
    return Html(table(header, rows))


def _samples(samples: Sequence[Sample]) -> Html:
    if not samples:
        return note("No sample prompts were set (evaluation.sample_prompts).")
    moments = sorted({(sample.step, sample.stage) for sample in samples})
    shown = moments if len(moments) == 1 else [moments[0], moments[-1]]
    texts = {(sample.step, sample.stage, sample.prompt): sample.text for sample in samples}
    blocks = []
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        columns = "".join(
            f"<div><h4>after {escape(stage)}</h4><pre>{escape(texts.get((step, stage, prompt), ''))}</pre></div>"
            for step, stage in shown
        )
        blocks.append(f'<div class="sample"><pre class="prompt">{escape(prompt)}</pre>{columns}</div>')
    return Html("".join(blocks))


def _lineage(data: RunData) -> Html:
    items = "".join(_ancestor(row) for row in data.stages)
    dataset = f"<p>Dataset <code>{escape(data.dataset_uri)}</code></p>"
    return Html(f'<ol class="lineage">{items}</ol>{dataset}')


def _ancestor(row: StageRow) -> Html:
    parent = f"from <code>{escape(row.parent_uri)}</code>" if row.parent_uri else "from initial weights"
    facts = f"{size(row.size_bytes)} · fingerprint {row.fingerprint[:12]}"
    return Html(
        f"<li><b>{escape(row.stage)}</b> <small>{escape(facts)}</small><br>"
        f"<code>{escape(row.uri)}</code><br><small>{parent}</small></li>"
    )


def _settings(data: RunData) -> Html:
    settings = json.dumps(data.settings, indent=2, ensure_ascii=False, default=str)
    versions = table(("Package", "Version"), sorted(data.versions.items())) if data.versions else note("Not recorded.")
    return Html(details("Resolved profile", Html(f"<pre>{escape(settings)}</pre>")) + details("Versions", versions))
