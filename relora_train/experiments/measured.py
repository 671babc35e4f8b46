"""Experiments that train no runs: the tutorial's regression, and speed and memory of training steps.

Their files lie beside the others'; a call measures all of it anew, in seconds or minutes, and writes a report of the
same form. `measure_throughput` is the paper's table 4: full rank beside ReLoRA, and a whole run with its warm start. A
run's speed is what its steps come to in time: with a share w of full-rank steps, 1 / (w / full + (1 - w) / ReLoRA).
Every round is adjusted by itself, so that what slows a machine down for a while meets both sides of a ratio.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, TypeAdapter, ValidationError

from relora_train.errors import ConfigError
from relora_train.experiments.bench import FULL, RELORA, StepResult, measure, step_requests
from relora_train.experiments.config import (
    PaperThroughput,
    ThroughputExperiment,
    TutorialExperiment,
    faults_of,
    invalid_experiment,
)
from relora_train.experiments.experiment import find_experiment
from relora_train.reports.statistics import Estimate, estimate
from relora_train.reports.text import estimate_text
from relora_train.settings.base import FrozenConfig
from relora_train.settings.keys import layered, settings_digest
from relora_train.settings.load import load_profile
from relora_train.text import decimal, size

_ADAPTER: TypeAdapter[TutorialExperiment | ThroughputExperiment] = TypeAdapter(
    Annotated[TutorialExperiment | ThroughputExperiment, Field(discriminator="kind")]
)


@dataclass(frozen=True)
class MeasuredExperiment:
    """An experiment that trains no runs, with all that goes over its file."""

    name: str
    config: TutorialExperiment | ThroughputExperiment

    @property
    def digest(self) -> str:
        """8 hex of what is measured: another question has a report of its own, beside the earlier one."""
        return settings_digest(self.config.model_dump(mode="json"))[:8]


class MeasuredTable(FrozenConfig):
    """A table of a report, as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


class Measured(FrozenConfig):
    """The result of such an experiment."""

    headline: str
    """In one sentence."""

    facts: str
    """When, where and over what."""

    tables: tuple[MeasuredTable, ...]
    captions: dict[str, tuple[str, str]] = Field(default_factory=dict)
    """Heading and caption of each figure, by file name."""

    numbers: dict[str, Any]
    """Everything that was measured, as JSON values."""


class MeasuredSummary(FrozenConfig):
    """The result of the flow compare."""

    experiment: str
    title: str
    measured: Measured
    html_uri: str
    json_uri: str
    picture_uris: tuple[str, ...]


def is_measured(name_or_path: str | Path) -> bool:
    """Return True if an experiment trains no runs. Raises ProfileNotFoundError."""
    try:
        return "kind" in tomllib.loads(find_experiment(name_or_path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False  # what is the matter is said when it is read


def load_measured(
    name_or_path: str | Path, overrides: Mapping[str, Any] | None = None, seeds: Sequence[int] | None = None
) -> MeasuredExperiment:
    """Resolve an experiment for which is_measured holds; overrides are settings of its section.

    Raises ExperimentInvalidError with all faults at once, ConfigError for seeds where there are none.
    """
    path = find_experiment(name_or_path)
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
    kind = str(settings.get("kind"))
    if seeds is not None and kind != "tutorial":
        raise ConfigError(f"Experiment {path.stem} has no seeds: its errors are over rounds. Leave --seeds out.")
    if strangers := sorted(set(layered(overrides or {})) - {kind}):
        raise ConfigError(
            f"Experiment {path.stem} trains no runs, so {strangers[0]!r} is none of its settings. What can be set over "
            f"it begins with '{kind}.': see profiles/experiments/README.md."
        )
    given = {} if seeds is None else {"seeds": list(seeds)}
    try:
        return MeasuredExperiment(path.stem, _ADAPTER.validate_python(layered(settings, overrides or {}) | given))
    except ValidationError as error:
        raise invalid_experiment(path, faults_of(error, below=1), where="there or in what goes over it") from None


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
