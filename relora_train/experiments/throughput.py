"""The paper's table 4, measured here: speed and memory, full rank beside ReLoRA, and a whole run with its warm start.

A run's speed is what its steps come to in time: with a share w of full-rank steps, 1 / (w / full + (1 - w) / ReLoRA).
Every round is adjusted by itself, so that what slows a machine down for a while meets both sides of a ratio. Light.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from relora_train.experiments.bench import FULL, RELORA, StepResult, measure, step_requests
from relora_train.experiments.config import PaperThroughput, ThroughputExperiment
from relora_train.experiments.measured import Measured, MeasuredTable
from relora_train.reports.statistics import Estimate, estimate
from relora_train.reports.text import estimate_text
from relora_train.settings.load import load_profile
from relora_train.text import decimal, size


def measure_throughput(config: ThroughputExperiment) -> Measured:
    """Measure every profile. Raises ProfileNotFoundError for an unknown one, TrainerCrashedError for one too large."""
    settings, rounds = config.throughput, config.throughput.rounds
    requests = {
        name: step_requests(load_profile(name, settings.set), updates=1 + rounds * settings.steps)
        for name in settings.profiles
    }
    numbers: dict[str, Any] = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "profiles": {}}
    for name, arms in requests.items():
        results = measure(arms, rounds=rounds, steps=settings.steps, what=name)
        full = results[FULL]
        numbers["device"] = full.device
        numbers["profiles"][name] = pair_record(full, results[RELORA], settings.warm_start_share)
    return summarize(config, numbers)


def pair_record(full: StepResult, relora: StepResult, share: float) -> dict[str, Any]:
    """Return tokens a second, ratios round by round, and peak memory of full rank and ReLoRA."""
    tokens, pair = full.request.profile.batch.tokens, {"full": full, "relora": relora}
    adjusted = [share * slow + (1 - share) * fast for slow, fast in zip(full.seconds, relora.seconds, strict=True)]

    def over_rounds(values: list[float]) -> dict[str, Any]:
        return cast(Estimate, estimate(values)).model_dump()

    seconds = {"full": full.seconds, "relora": relora.seconds, "adjusted": adjusted}
    return {
        "step_seconds": {name: list(values) for name, values in seconds.items()},
        "tokens_per_second": {name: over_rounds([tokens / t for t in values]) for name, values in seconds.items()},
        "speed_over_full": {
            name: over_rounds([slow / t for slow, t in zip(full.seconds, seconds[name], strict=True)])
            for name in ("relora", "adjusted")
        },
        "peak_bytes": {arm: one.memory["weights"] + one.memory["above_weights"] for arm, one in pair.items()},
        "optimizer_bytes": {arm: one.memory["optimizer"] for arm, one in pair.items()},
    }


def summarize(config: ThroughputExperiment, numbers: dict[str, Any]) -> Measured:
    """Tables and headline from what was measured. Pure."""
    settings = config.throughput
    share = decimal(100 * settings.warm_start_share, 0)
    note = (
        f"Mean ± standard error over {settings.rounds} rounds in which both took turns; ratios are taken within a "
        f"round. Adjusted: a run whose first {share} % of steps are full rank, by time."
    )
    speeds, peaks, headline = [], [], ""
    for name, record in numbers["profiles"].items():
        rate, over = (
            {key: estimate_text(Estimate.model_validate(value)) for key, value in record[measured].items()}
            for measured in ("tokens_per_second", "speed_over_full")
        )
        headline = (
            f"At {name} a ReLoRA step is {over['relora']} times as fast as a full-rank one; a run whose first {share} "
            f"% of steps are full rank {over['adjusted']} times."
        )
        speeds.append((name, rate["full"], rate["relora"], over["relora"], rate["adjusted"], over["adjusted"]))
        full, relora = record["peak_bytes"]["full"], record["peak_bytes"]["relora"]
        peaks.append((name, size(full), size(relora), decimal(relora / full, 2)))
    heads, most = ("Step", "Full", "ReLoRA", "x full"), "The most held during a step, weights included."
    speed_heads = (*heads, "adjusted", "x full")
    tables = [
        MeasuredTable(title="Speed, tokens a second", header=speed_heads, rows=tuple(speeds), note=note),
        MeasuredTable(title="Memory", header=heads, rows=tuple(peaks), note=most),
        *([_paper_table(config, numbers)] if config.paper else []),
    ]
    facts = f"{numbers['device']} · measured {numbers['measured_at'].replace('T', ' ').partition('+')[0]} UTC"
    return Measured(headline=headline, facts=facts, tables=tuple(tables), numbers=numbers)


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
    for name, record in numbers["profiles"].items():
        rate = {key: decimal(value["mean"], 0) for key, value in record["tokens_per_second"].items()}
        over = {key: decimal(value["mean"], 2) for key, value in record["speed_over_full"].items()}
        ratios = over["relora"], rate["adjusted"], over["adjusted"], over["adjusted"]
        rows.append((f"{name} (here, tokens/s)", rate["full"], rate["relora"], *ratios))
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
