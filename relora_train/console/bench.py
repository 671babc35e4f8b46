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
from rich.text import Text

from relora_train.benchmarking.measure import ArmResult, Ratio, measure, speed_ratio
from relora_train.benchmarking.request import ARMS, SHAPES, Arm, ArmRequest, Shape
from relora_train.console.tables import BLANK, View, add_row, table
from relora_train.errors import ConfigError

DEFAULT_SHAPES = ("20m", "35m")
_FASTEST = "ours-fast"
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
    console: Console,
) -> dict[str, Any]:
    """Measure every shape and return the record that is written as JSON."""
    record: dict[str, Any] = {**about_this_machine(), "precision": precision, "dropout": dropout, "shapes": {}}
    for name in names:
        shape = _shape(name, rank, sequence_length, sequences)
        requests = arm_requests(shape, precision=precision, dropout=dropout, threads=threads, compiled=compiled)
        with console.status(f"{name}: starting {len(requests)} arms") as status:
            on_round = partial(_show_round, status, name, rounds)
            results = measure(requests, rounds=rounds, steps=steps, on_round=on_round)
        record["shapes"][name] = {"shape": shape.model_dump(), "arms": records_of(results)}
    return record


def _show_round(status: Status, name: str, rounds: int, done: int) -> None:
    status.update(f"{name}: round {done} of {rounds} done")


def _shape(name: str, rank: int | None, sequence_length: int | None, sequences: int | None) -> Shape:
    if name not in SHAPES:
        raise ConfigError(f"There is no shape {name!r} to measure. Choose from: {', '.join(SHAPES)}.")
    changed = {"rank": rank, "sequence_length": sequence_length, "sequences": sequences}
    update = {key: value for key, value in changed.items() if value is not None}
    return Shape.model_validate({**SHAPES[name].model_dump(), **update})


def arm_requests(
    shape: Shape, *, precision: Precision, dropout: float, threads: int | None, compiled: bool
) -> dict[str, ArmRequest]:
    """The arms by label. ours-fast: products as "medium" precision has them, on many CPUs of the same accuracy."""
    common: dict[str, Any] = {
        "shape": shape, "precision": precision, "dropout": dropout, "threads": threads, "compile": compiled,
    }  # fmt: skip
    requests: dict[str, ArmRequest] = {arm: ArmRequest(arm=arm, **common) for arm in _installed_arms()}
    if precision == "float32":
        requests[_FASTEST] = ArmRequest(arm="ours", matmul_precision="medium", **common)
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
    """Every arm's numbers, with its speed relative to the peers."""
    peers = [peer for peer in ("full", "paper", "peft", "ours-full") if peer in results]
    return {
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
            "speed_over": {peer: _ratio_record(speed_ratio(result, results[peer])) for peer in peers},
        }
        for label, result in results.items()
    }


def _ratio_record(ratio: Ratio) -> dict[str, float]:
    return {"median": ratio.median, "lowest": ratio.lowest, "highest": ratio.highest}


def bench_view(record: Mapping[str, Any]) -> View:
    """The record as a table a shape."""
    parts: View = []
    for name, measured in record["shapes"].items():
        shape, arms = measured["shape"], measured["arms"]
        title = (
            f"{name}: hidden {shape['hidden_size']}, {shape['layers']} layers, vocabulary {shape['vocab_size']:,}, "
            f"rank {shape['rank']}, {shape['sequences']} x {shape['sequence_length']} tokens, {record['precision']}, "
            f"dropout {record['dropout']:g}"
        )
        made = table(
            "step", "tokens/s", "x full", "x paper", "x peft", "MFLOPs/token", "of peak", "weights", "optimizer",
            "rest", title=title,
        )  # fmt: skip
        for label, arm in arms.items():
            memory = arm["memory_bytes"]
            rest = memory["above_weights"] - memory["optimizer"]
            add_row(
                made,
                label,
                f"{arm['tokens_per_second']:,.0f}",
                *(_ratio_text(arm["speed_over"].get(peer)) for peer in ("full", "paper", "peft")),
                f"{arm['flops_per_token'] / 1e6:,.1f}",
                f"{arm['utilisation']:.0%}",
                *(f"{size / 1e6:,.0f} MB" for size in (memory["weights"], memory["optimizer"], rest)),
            )
        parts += [BLANK, made, *_orders(arms)]
    any_arm = next(iter(next(iter(record["shapes"].values()))["arms"].values()))
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    where = f"{any_arm['device']}, {any_arm['threads']} threads; {versions}"
    parts += [BLANK, Text(f"Ratios: median of the rounds (lowest–highest). {where}.", style="dim")]
    return parts


def _orders(arms: Mapping[str, Any]) -> list[Text]:
    orders = arms.get("ours", {}).get("orders", {})
    by_order: dict[str, list[str]] = {}
    for layer, order in orders.items():
        by_order.setdefault(order, []).append(layer.rpartition(".")[2])
    return [Text(f"  {', '.join(layers)}: {order}", style="dim") for order, layers in by_order.items()]


def _ratio_text(ratio: Mapping[str, float] | None) -> str:
    return "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['lowest']:.2f}–{ratio['highest']:.2f})"
