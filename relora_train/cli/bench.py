"""`relora bench`: this library's step beside its peers', as tables and JSON. Imports no torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from relora_train.cli.tables import BLANK, View, add_row, table
from relora_train.errors import ConfigError
from relora_train.experiments.benchmark.measure import (
    ArmResult,
    Ratio,
    extra_cost,
    measure,
    share_of_flop_bound,
    speed_ratio,
)
from relora_train.experiments.benchmark.request import ARMS, FEW_ARMS, Arm, ArmRequest, Shape, find_shape

DEFAULT_SHAPES = ("20m", "35m", "20m-32k")
_FASTEST = "ours-fast"
_NO_DROPOUT, _SAME_ORDER = "ours p=0", "ours p=0 split"
_PACKAGES = ("torch", "transformers", "peft", "relora-train")
Precision = Literal["float32", "bfloat16"]


def bench(
    names: Sequence[str],
    *,
    precision: Precision,
    dropout: float,
    rank: int | None,
    sequence_length: int | None,
    sequences: int | None,
    rounds: int,
    steps: int,
    threads: int | None,
    compiled: bool,
    arms: Sequence[str],
    console: Console,
) -> dict[str, Any]:
    """Measure every shape and return the record that is written as JSON. Every name is looked up before any work."""
    shapes = {name: _shape(name, rank, sequence_length, sequences) for name in names}
    requests = {
        name: _chosen_arms(
            arms,
            name,
            arm_requests(shape, precision=precision, dropout=dropout, threads=threads, compiled=compiled),
        )
        for name, shape in shapes.items()
    }
    record: dict[str, Any] = {**about_this_machine(), "precision": precision, "dropout": dropout, "shapes": {}}
    for name, shape in shapes.items():
        with console.status(f"{name}: starting {len(requests[name])} arms") as status:
            on_round = partial(_show_round, status, name, rounds)
            results = measure(requests[name], rounds=rounds, steps=steps, on_round=on_round)
        record["shapes"][name] = {"shape": shape.model_dump(), **records_of(results)}
    return record


def _chosen_arms(wanted: Sequence[str], shape_name: str, requests: dict[str, ArmRequest]) -> dict[str, ArmRequest]:
    """Those asked for; without any, those that the shape is there for."""
    if unknown := [arm for arm in wanted if arm not in requests]:
        raise ConfigError(
            f"There is no arm {unknown[0]!r} to measure at {shape_name} with these options. "
            f"Choose from: {', '.join(requests)}."
        )
    chosen = wanted or FEW_ARMS.get(shape_name) or tuple(requests)
    return {label: request for label, request in requests.items() if label in chosen}


def _show_round(status: Status, name: str, rounds: int, done: int) -> None:
    status.update(f"{name}: round {done} of {rounds} done")


def _shape(name: str, rank: int | None, sequence_length: int | None, sequences: int | None) -> Shape:
    changed = {"rank": rank, "sequence_length": sequence_length, "sequences": sequences}
    update = {key: value for key, value in changed.items() if value is not None}
    return Shape.model_validate({**find_shape(name).model_dump(), **update})


def arm_requests(
    shape: Shape, *, precision: Precision, dropout: float, threads: int | None, compiled: bool
) -> dict[str, ArmRequest]:
    """The arms by label. ours-fast: the fastest products of float32's accuracy. What dropout costs is seen against
    ours without it, which may merge weights, and against that in the order of products that dropout leaves.
    """
    common: dict[str, Any] = {
        "shape": shape, "precision": precision, "dropout": dropout, "threads": threads, "compile": compiled,
    }  # fmt: skip
    requests: dict[str, ArmRequest] = {arm: ArmRequest(arm=arm, **common) for arm in _installed_arms()}
    if precision == "float32":
        requests[_FASTEST] = ArmRequest(arm="ours", matmul_precision="auto", **common)
    if dropout > 0:
        none = {**common, "dropout": 0.0}
        requests[_NO_DROPOUT] = ArmRequest(arm="ours", **none)
        if precision == "float32":  # a weight in bfloat16 is never merged: the order is the same
            requests[_SAME_ORDER] = ArmRequest(arm="ours", as_with_dropout=True, **none)
    return requests


def _installed_arms() -> Sequence[Arm]:
    try:
        version("peft")
    except PackageNotFoundError:
        return [arm for arm in ARMS if arm != "peft"]
    return ARMS


def about_this_machine() -> dict[str, Any]:
    """When, on what, with which versions."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "versions": versions,
    }


def records_of(results: Mapping[str, ArmResult]) -> dict[str, Any]:
    """Every arm's numbers, with its speed relative to the peers; what dropout costs; memory beside the paper's."""
    peers = [peer for peer in ("full", "paper", "peft", "ours-full") if peer in results]
    arms = {
        label: {
            "device": result.device,
            "threads": result.threads,
            "tokens_per_second": result.tokens_per_second,
            "step_seconds": list(result.seconds),
            "flops_per_token": result.flops_per_token,
            "matmul_flops_per_second": result.matmul_flops,
            "utilisation": result.utilisation,
            "memory_bytes": dict(result.memory),
            "loss": result.loss,
            "orders": dict(result.notes),
            "matmul_precision": result.matmul_precision,
            "speed_over": {peer: _ratio_record(speed_ratio(result, results[peer])) for peer in peers},
            **_flop_bound(label, results),
        }
        for label, result in results.items()
    }
    return {"arms": arms, "dropout_cost": _dropout_cost(results), "memory_over_paper": _memory_over_paper(results)}


def _flop_bound(label: str, results: Mapping[str, ArmResult]) -> dict[str, Any]:
    """Of ours, against our own full-rank step with the same products: what the FLOPs allow, and how much is reached."""
    if label not in ("ours", _NO_DROPOUT) or "ours-full" not in results:
        return {}
    ours, full = results[label], results["ours-full"]
    return {
        "flop_bound": full.flops_per_token / ours.flops_per_token,
        "share_of_flop_bound": _ratio_record(share_of_flop_bound(ours, full)),
    }


def _dropout_cost(results: Mapping[str, ArmResult]) -> dict[str, dict[str, float]]:
    """Shares of a step's time: all of it; the order that cannot merge; drawing masks and multiplying by them."""
    pairs = {
        "total": ("ours", _NO_DROPOUT),
        "order": (_SAME_ORDER, _NO_DROPOUT),
        "masks": ("ours", _SAME_ORDER),
    }
    return {
        part: _ratio_record(extra_cost(results[slower], results[faster]))
        for part, (slower, faster) in pairs.items()
        if slower in results and faster in results
    }


def _memory_over_paper(results: Mapping[str, ArmResult]) -> dict[str, float]:
    """Of ours to the paper's: the peak above weights and Adam's state, held at all times, and above weights alone."""
    if "paper" not in results or "ours" not in results:
        return {}
    ours, paper = results["ours"].memory, results["paper"].memory
    rest = ours["above_weights"] - ours["optimizer"], paper["above_weights"] - paper["optimizer"]
    return {
        "above_weights": ours["above_weights"] / paper["above_weights"],
        "above_weights_and_optimizer": rest[0] / max(rest[1], 1),
    }


def _ratio_record(ratio: Ratio) -> dict[str, float]:
    return {"median": ratio.median, "lowest": ratio.lowest, "highest": ratio.highest}


def bench_view(record: Mapping[str, Any]) -> View:
    """The record as two tables a shape, and what follows from them."""
    parts: View = []
    for name, measured in record["shapes"].items():
        shape, arms = measured["shape"], measured["arms"]
        title = (
            f"{name}: hidden {shape['hidden_size']}, {shape['layers']} layers, vocabulary {shape['vocab_size']:,}, "
            f"rank {shape['rank']}, {shape['sequences']} x {shape['sequence_length']} tokens, {record['precision']}, "
            f"dropout {record['dropout']:g}"
        )
        parts += [BLANK, _speed_table(arms, title), BLANK, _cost_table(arms)]
        parts += [*_orders(arms), *_findings(measured, record["dropout"])]
    any_arm = next(iter(next(iter(record["shapes"].values()))["arms"].values()))
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    where = f"{any_arm['device']}, {any_arm['threads']} threads; {versions}"
    parts += [BLANK, Text(f"Ratios: median of the rounds (lowest–highest). {where}.", style="dim")]
    return parts


def _speed_table(arms: Mapping[str, Any], title: str) -> Table:
    peers = [peer for peer in ("full", "paper", "peft") if peer in arms]
    made = table("step", "tokens/s", *(f"x {peer}" for peer in peers), "of peak", title=title)
    for label, arm in arms.items():
        ratios = (_ratio_text(arm["speed_over"][peer]) for peer in peers)
        add_row(made, label, f"{arm['tokens_per_second']:,.0f}", *ratios, f"{arm['utilisation']:.0%}")
    return made


def _cost_table(arms: Mapping[str, Any]) -> Table:
    made = table("step", "MFLOPs/token", "weights", "optimizer", "rest of the peak")
    for label, arm in arms.items():
        memory = arm["memory_bytes"]
        sizes = memory["weights"], memory["optimizer"], memory["above_weights"] - memory["optimizer"]
        add_row(made, label, f"{arm['flops_per_token'] / 1e6:,.1f}", *(f"{size / 1e6:,.0f} MB" for size in sizes))
    return made


def _orders(arms: Mapping[str, Any]) -> list[Text]:
    orders = arms.get("ours", {}).get("orders", {})
    by_order: dict[str, list[str]] = {}
    for layer, order in orders.items():
        by_order.setdefault(order, []).append(layer.rpartition(".")[2])
    return [Text(f"  {', '.join(layers)}: {order}", style="dim") for order, layers in by_order.items()]


def _findings(measured: Mapping[str, Any], dropout: float) -> list[Text]:
    """Lines below a shape's table."""
    arms, lines = measured["arms"], []
    for label, arm in arms.items():
        if "flop_bound" in arm:
            lines.append(
                f"{label} / ours-full: {_ratio_text(arm['speed_over']['ours-full'])} times as fast, "
                f"{_share_text(arm['share_of_flop_bound'], '.0%')} of the {arm['flop_bound']:.2f} that FLOPs allow here"
            )
    if cost := measured["dropout_cost"]:
        parts = ", ".join(f"{part} {_share_text(share, '+.1%')}" for part, share in cost.items())
        lines.append(f"dropout {dropout:g} costs of a step: {parts}")
    if memory := measured["memory_over_paper"]:
        lines.append(
            f"peak memory, ours / paper: {memory['above_weights_and_optimizer']:.2f} above weights and optimizer, "
            f"{memory['above_weights']:.2f} above weights alone"
        )
    if _FASTEST in arms:
        lines.append(f"{_FASTEST} multiplies at {arms[_FASTEST]['matmul_precision']}")
    return [Text(f"  {line}") for line in lines]


def _share_text(share: Mapping[str, float], form: str) -> str:
    return f"{share['median']:{form}} ({share['lowest']:{form}} to {share['highest']:{form}})"


def _ratio_text(ratio: Mapping[str, float] | None) -> str:
    return "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['lowest']:.2f}–{ratio['highest']:.2f})"
