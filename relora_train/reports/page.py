"""The HTML page of a run: what templates/run.html shows, computed."""

from __future__ import annotations

import json
from collections.abc import Mapping

from relora_train.reports.plot_style import MAX_POINTS
from relora_train.reports.plots import loss_ceiling, score_plot_name
from relora_train.reports.ranks.cycles import successive_overlap
from relora_train.reports.ranks.layers import natural_order
from relora_train.reports.ranks.measures import PAPER_THRESHOLD
from relora_train.reports.render import TEMPLATES, render
from relora_train.reports.run_data import RunData
from relora_train.reports.text import change, score
from relora_train.settings.measures import LOSS
from relora_train.text import count, decimal, duration

Tile = tuple[str, str, str]


def render_page(data: RunData, pictures: Mapping[str, bytes]) -> str:
    """Return the whole page. pictures: PNG bytes by name."""
    ranks = [row.rank for row in data.stages if row.rank is not None]
    moments = sorted({(sample.step, sample.stage) for sample in data.samples})
    history, measures = data.history, data.measures
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
        overlaps=[successive_overlap(history.overlaps, side) for side in ("columns", "rows")]
        if history is not None and history.overlaps
        else None,
        moments=moments if len(moments) < 2 else [moments[0], moments[-1]],
        sample_texts={(sample.step, sample.stage, sample.prompt): sample.text for sample in data.samples},
        settings_json=json.dumps(data.settings, indent=2, ensure_ascii=False, default=str),
    )


def _tiles(data: RunData) -> list[Tile]:
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
    drawn, bad = len(data.train), data.train.not_finite if len(data.train) else 0
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
