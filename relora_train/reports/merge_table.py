"""A merge as rows of a table: all layers together, each kind of layer, each layer. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_DIGITS = 4

Layers = Mapping[str, Mapping[str, float]]


def merge_table(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the merge report of a manifest as rows with the same keys; '' where a number is known of all layers only.

    ∇A and ∇B are the largest gradient norms of the cycle's first steps. Norms of several layers are of all their
    weights together; their effective rank is the mean.
    """
    layers: Layers = report.get("layers", {})
    kinds = dict.fromkeys(_kind(name) for name in layers)
    rows = [_row("all layers", layers, report)]
    if len(kinds) > 1:
        rows += [_row(f"all {kind}", {n: layers[n] for n in layers if _kind(n) == kind}) for kind in kinds]
    return rows + [_row(_shown(name), {name: layer}) for name, layer in layers.items()]


def _row(name: str, layers: Layers, report: Mapping[str, Any] | None = None) -> dict[str, Any]:
    whole = report or {}
    update, weight = _norm(layers, "update_norm"), _norm(layers, "weight_norm")
    ranks = [layer["effective_rank"] for layer in layers.values()]
    return {
        "layer": name,
        "‖ΔW‖ / ‖W‖": _short(update / weight if weight else None),
        "‖ΔW‖": _short(update),
        "effective rank": _short(sum(ranks) / len(ranks) if ranks else None),
        "output change": _short(whole.get("max_relative_output_change")),
        "Adam zeroed": _short(whole.get("optimizer_state_zeroed")),
        "∇A": _short(whole.get("first_lora_A_grad_norm")),
        "∇B": _short(whole.get("first_lora_B_grad_norm")),
    }


def _norm(layers: Layers, key: str) -> float:
    return math.sqrt(sum(layer[key] ** 2 for layer in layers.values()))


def _kind(name: str) -> str:
    """Return 'q_proj' of 'model.layers.0.self_attn.q_proj.weight'."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _shown(name: str) -> str:
    """Return 'layers.0.self_attn.q_proj' of 'model.layers.0.self_attn.q_proj.weight': the rest is the same for all."""
    return name.removesuffix(".weight").removeprefix("model.")


def _short(value: float | None) -> str:
    """Text, because a table of the UI shows floats with all their digits."""
    return "" if value is None else f"{value:.{_DIGITS}g}"
