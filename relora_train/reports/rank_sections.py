"""What a report says of the rank of the total update: its spectra, its growth over cycles, and the cycles' overlaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from relora_train.reports.html import Html, details, escape, figure, note, table
from relora_train.reports.ranks.cycles import CycleHistory, LayerOverlap
from relora_train.reports.ranks.measures import PAPER_THRESHOLD
from relora_train.reports.run_data import RunData
from relora_train.reports.text import count, decimal, percent

Pictures = Mapping[str, tuple[bytes, bytes]]
"""PNG bytes by name, for a light and for a dark page."""


def rank_sections(data: RunData, pictures: Pictures) -> Html:
    """The parts there is something to say about, and what was left out."""
    parts = [_spectra(data, pictures)] if data.spectra else []
    if data.history is not None:
        parts += [_growth(data.history, pictures), _overlaps(data.history, pictures)]
    if not parts and not data.spectra_notes:
        parts = [note("No two checkpoints with weights to compare.")]
    return Html("".join([*parts, *map(note, data.spectra_notes)]))


def _spectra(data: RunData, pictures: Pictures) -> Html:
    start, end = data.spectra_between or ("", "")
    ranks = [row.rank for row in data.stages if row.rank is not None]
    largest = max(spectrum.numerical_rank for spectrum in data.spectra)
    one = f" One cycle's update has rank {count(ranks[-1])} at most." if ranks else ""
    result = f"The update from {start} to {end} reaches rank {count(largest)} in the layers shown.{one}"
    lines = "Vertical lines: rank of one cycle, and sum of all ranks where it fits. " if ranks else ""
    caption = f"{lines}Horizontal line: {PAPER_THRESHOLD}. What rounding could have made is not drawn."
    header = ("Layer", "Shape", "Largest", "Below 0.1", "Effective rank", "Stable rank", "Rank", "‖ΔW‖ / ‖W‖")
    rows = [
        (
            spectrum.name,
            f"{spectrum.shape[0]:,} × {spectrum.shape[1]:,}",
            decimal(float(spectrum.values[0]), 3),
            f"{count(spectrum.below_threshold)} of {count(len(spectrum.values))}",
            decimal(spectrum.effective_rank, 1),
            decimal(spectrum.stable_rank, 1),
            count(spectrum.numerical_rank),
            percent(spectrum.relative_update_norm, 1),
        )
        for spectrum in data.spectra
    ]
    text = (
        "Rank counts the singular values above what float32 rounding of the weights can make. Effective rank is "
        "exp(entropy of the singular values); stable rank is the squared Frobenius norm over the squared spectral norm."
    )
    plot = figure(pictures["spectra.png"], f"Singular values of W({end}) − W({start})", caption)
    return Html(f"<p>{escape(result)}</p>" + plot + table(header, rows) + note(text))


def _growth(history: CycleHistory, pictures: Pictures) -> Html:
    if "growth.png" not in pictures:
        return Html("")
    caption = "Of the sum of the updates merged so far, from the adapters of the cycles: mean over each kind's layers."
    header = ("Layer", *history.growth_stages)
    rows = [
        (
            layer.name,
            *(f"{decimal(s.effective_rank, 1)} · {count(s.at_threshold)}" for s in layer.spectra),
        )
        for layer in history.growth
    ]
    plot = figure(pictures["growth.png"], "Growth of the total update's rank", caption)
    title = "Layer by layer: effective rank · singular values of 0.1 or more"
    return Html(plot + details(title, table(header, rows), printed=False))


def _overlaps(history: CycleHistory, pictures: Pictures) -> Html:
    if "overlap.png" not in pictures:
        return Html("")
    columns, column_chance = successive_overlap(history.overlaps, "columns")
    rows, row_chance = successive_overlap(history.overlaps, "rows")
    caption = (
        f"Mean cos² of the principal angles between the updates B·A of two cycles: 1 for the same subspace, 0 for "
        f"orthogonal ones. Successive cycles: {decimal(columns, 3)} in column space (what a layer writes; chance "
        f"{decimal(column_chance, 3)}), {decimal(rows, 3)} in row space (what it reads; chance "
        f"{decimal(row_chance, 3)})."
    )
    return figure(pictures["overlap.png"], "Overlap of the cycles' subspaces", caption)


def successive_overlap(overlaps: Sequence[LayerOverlap], side: str) -> tuple[float, float]:
    """Mean over layers and successive stages of the overlap in 'columns' or 'rows', and what chance would give."""
    values = [np.diag(getattr(one, side), k=1) for one in overlaps]
    chances = [getattr(one, f"chance_{side}") for one in overlaps]
    known = np.concatenate(values)
    known = known[np.isfinite(known)]
    return float(np.mean(known)) if known.size else math.nan, float(np.mean(chances))
