"""The paper's table 4, measured here: speed and memory, full rank beside ReLoRA, and a whole run with its warm start.

A run's speed is what its steps come to in time: with a share w of full-rank steps, 1 / (w / full + (1 - w) / ReLoRA).
Every round is adjusted by itself, so that what slows a machine down for a while meets both sides of a ratio. Light.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

from relora_train import events
from relora_train.experiments.benchmark.measure import ArmResult, measure
from relora_train.experiments.benchmark.request import Arm, ArmRequest, Shape, find_shape
from relora_train.experiments.measured import (
    Measured,
    MeasuredTable,
    PaperThroughput,
    ThroughputExperiment,
    ThroughputSettings,
)
from relora_train.reports.statistics import Estimate, estimate
from relora_train.reports.text import decimal, estimate_text, size

PAIRS: dict[str, tuple[Arm, Arm]] = {
    "this library": ("ours-full", "ours"),
    "as the paper's code": ("full", "paper"),
}
"""Full rank and ReLoRA in the same hands; see experiments/benchmark/request.py."""


def measure_throughput(config: ThroughputExperiment) -> Measured:
    """Measure every shape. Raises ConfigError for an unknown one, TrainerCrashedError for one that does not fit."""
    settings = config.throughput
    shapes = {name: find_shape(name) for name in settings.shapes}
    numbers: dict[str, Any] = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "shapes": {}}
    device = ""
    for name, shape in shapes.items():
        results = _measure_shape(name, shape, settings)
        first = results["ours-full"]
        device = f"{first.device}, {first.threads} threads" if first.device == "cpu" else first.device
        numbers["shapes"][name] = {
            label: pair_record(results[full], results[relora], settings.warm_start_share)
            for label, (full, relora) in PAIRS.items()
        }
    numbers["device"] = device
    return summarize(config, numbers)


def _measure_shape(name: str, shape: Shape, settings: ThroughputSettings) -> dict[str, ArmResult]:
    requests = {
        arm: ArmRequest(
            arm=arm,
            shape=shape,
            precision=settings.precision,
            dropout=settings.dropout,
            threads=settings.threads,
        )
        for pair in PAIRS.values()
        for arm in pair
    }
    on_round = partial(_show_round, name, settings.rounds)
    return measure(
        cast(Mapping[str, ArmRequest], requests), rounds=settings.rounds, steps=settings.steps, on_round=on_round
    )


def _show_round(name: str, rounds: int, done: int) -> None:
    events.emit("measuring", what=name, done=done, total=rounds)


def pair_record(full: ArmResult, relora: ArmResult, share: float) -> dict[str, Any]:
    """Of full rank and ReLoRA at one shape: tokens a second, ratios round by round, and peak memory."""
    tokens = full.request.shape.tokens
    adjusted = [share * slow + (1 - share) * fast for slow, fast in zip(full.seconds, relora.seconds, strict=True)]
    seconds = {"full": full.seconds, "relora": relora.seconds, "adjusted": adjusted}
    peaks = {
        name: arm.memory["weights"] + arm.memory["above_weights"] for name, arm in (("full", full), ("relora", relora))
    }
    return {
        "step_seconds": {name: list(values) for name, values in seconds.items()},
        "tokens_per_second": {name: _estimate([tokens / t for t in values]) for name, values in seconds.items()},
        "speed_over_full": {
            name: _estimate([slow / t for slow, t in zip(full.seconds, seconds[name], strict=True)])
            for name in ("relora", "adjusted")
        },
        "peak_bytes": peaks,
        "optimizer_bytes": {"full": full.memory["optimizer"], "relora": relora.memory["optimizer"]},
    }


def _estimate(values: list[float]) -> dict[str, Any]:
    return cast(Estimate, estimate(values)).model_dump()


def summarize(config: ThroughputExperiment, numbers: dict[str, Any]) -> Measured:
    """Tables and headline from what was measured. Pure."""
    settings = config.throughput
    records = {
        f"{name}, {label}": record for name, pairs in numbers["shapes"].items() for label, record in pairs.items()
    }
    last = numbers["shapes"][settings.shapes[-1]]["this library"]
    gain = Estimate.model_validate(last["speed_over_full"]["adjusted"])
    at_once = Estimate.model_validate(last["speed_over_full"]["relora"])
    share = decimal(100 * settings.warm_start_share, 0)
    headline = (
        f"At {settings.shapes[-1]} a ReLoRA step is {estimate_text(at_once)} times as fast as a full-rank one in this "
        f"library; a run whose first {share} % of steps are full rank {estimate_text(gain)} times."
    )
    note = (
        f"Mean ± standard error over {settings.rounds} rounds in which all arms took turns; ratios are taken within a "
        f"round. Adjusted: a run whose first {share} % of steps are full rank, by time."
    )
    speed = MeasuredTable(
        title="Speed, tokens a second",
        header=("Step", "Full", "ReLoRA", "x full", "adjusted", "x full"),
        rows=tuple(_speed_row(label, record) for label, record in records.items()),
        note=note,
    )
    memory = MeasuredTable(
        title="Memory",
        header=("Step", "Full", "ReLoRA", "x full"),
        rows=tuple(_memory_row(label, record) for label, record in records.items()),
        note="The most held during a step, weights included.",
    )
    facts = (
        f"{numbers['device']} · {settings.precision} · dropout {settings.dropout:g} · measured "
        f"{numbers['measured_at'].replace('T', ' ').partition('+')[0]} UTC"
    )
    tables = (speed, memory, _paper_table(config, numbers)) if config.paper else (speed, memory)
    return Measured(headline=headline, facts=facts, tables=tables, numbers=numbers)


def _speed_row(label: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    rate, over = (
        {name: estimate_text(Estimate.model_validate(value)) for name, value in record[key].items()}
        for key in ("tokens_per_second", "speed_over_full")
    )
    return label, rate["full"], rate["relora"], over["relora"], rate["adjusted"], over["adjusted"]


def _memory_row(label: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    full, relora = record["peak_bytes"]["full"], record["peak_bytes"]["relora"]
    return label, size(full), size(relora), decimal(relora / full, 2)


def _paper_table(config: ThroughputExperiment, numbers: Mapping[str, Any]) -> MeasuredTable:
    share = config.throughput.warm_start_share
    rows = [
        (
            f"{column.where} (paper, examples/s)",
            f"{column.full:g}",
            f"{column.relora:g}",
            decimal(column.relora / column.full, 2),
            f"{column.adjusted:g}",
            f"{1 + column.total_percent / 100:.2f}",
            decimal(adjusted_speed(column, share) / column.full, 2),
        )
        for column in config.paper
    ]
    for name, pairs in numbers["shapes"].items():
        for label, record in pairs.items():
            rate = {key: decimal(value["mean"], 0) for key, value in record["tokens_per_second"].items()}
            over = {key: decimal(value["mean"], 2) for key, value in record["speed_over_full"].items()}
            ours = f"{name}, {label} (here, tokens/s)"
            rows.append(
                (
                    ours,
                    rate["full"],
                    rate["relora"],
                    over["relora"],
                    rate["adjusted"],
                    over["adjusted"],
                    over["adjusted"],
                )
            )
    header = ("Where", "Full", "ReLoRA", "x full", "adjusted", "run x full", "by our formula")
    note = (
        f"{config.paper_source}. The paper's hardware ran its 1.3B model: compare ratios, not rates. By our formula: "
        f"1 / (w / full + (1 - w) / ReLoRA) with w = {decimal(share, 2)}, from the paper's own two rates; its printed "
        "gains of whole runs do not all follow from them."
    )
    return MeasuredTable(title="The paper's table 4 beside ours", header=header, rows=tuple(rows), note=note)


def adjusted_speed(column: PaperThroughput, share: float) -> float:
    """Examples a second of a run of which this share of steps is full rank."""
    return 1 / (share / column.full + (1 - share) / column.relora)
