"""The numbers of a rank analysis as JSON values; a number that is not finite becomes null."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from relora_train.reports.ranks.cycles import CycleHistory
from relora_train.reports.ranks.measures import PAPER_THRESHOLD, KindSpectrum, LayerSpectrum, Matrix


def spectrum_record(spectrum: LayerSpectrum) -> dict[str, Any]:
    """Return one layer's update."""
    return {"name": spectrum.name, **_measures(spectrum), "singular_values": _rounded(spectrum.values)}


def kind_record(kind: KindSpectrum) -> dict[str, Any]:
    """Return the means over the layers of one kind."""
    about = {"kind": kind.kind, "layers": kind.layers, "shape": kind.shape}
    return {**about, **_ranks(kind), "singular_values": _rounded(kind.values)}


def history_record(history: CycleHistory) -> dict[str, Any]:
    """Return growth by layer, with singular values of the whole update alone, and the overlap of successive cycles."""
    return {
        "growth_stages": history.growth_stages,
        "growth_ranks": history.growth_ranks,
        "growth": [{"name": layer.name, "after": list(map(_measures, layer.spectra))} for layer in history.growth],
        "overlap": {side: {"mean": mean, "chance": chance} for side, (mean, chance) in history.overlap.items()},
    }


def json_value(value: Any) -> Any:
    """Return the value with every non-finite float as None, all the way down."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measures(spectrum: LayerSpectrum) -> dict[str, Any]:
    largest = float(spectrum.values[0])
    return {"shape": spectrum.shape, "largest": largest, "tolerance": spectrum.tolerance, **_ranks(spectrum)}


def _ranks(measured: LayerSpectrum | KindSpectrum) -> dict[str, Any]:
    names = ("effective_rank", "stable_rank", "numerical_rank", "relative_update_norm")
    below = {"threshold": PAPER_THRESHOLD, "count": measured.below_threshold}
    return {"below": below, **{name: getattr(measured, name) for name in names}}


def _rounded(values: Matrix) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
