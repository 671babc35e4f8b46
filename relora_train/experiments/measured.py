"""Experiments that train no runs: the tutorial's regression, and speed and memory of training steps. Light.

Their files lie beside the others' and say what they are by `kind`; a call measures all of it anew, in seconds or
minutes, and writes a report of the same form.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from relora_train.errors import ConfigError
from relora_train.experiments.config import Seeds, faults_of, invalid_experiment
from relora_train.experiments.experiment import find_experiment
from relora_train.settings.base import FrozenConfig
from relora_train.settings.keys import layered, settings_digest


class TutorialSettings(FrozenConfig):
    """The regression y = x Wᵀ + noise and its training; the same for all arms but for the learning rate's shape."""

    samples: int = Field(200, ge=1)
    """Rows of x and y."""

    inputs: int = Field(10, ge=1)
    """Columns of x."""

    outputs: int = Field(5, ge=1)
    """Columns of y."""

    noise: float = Field(0.1, ge=0)
    """Standard deviation of what no weight explains."""

    rank: int = Field(4, ge=1)
    """Rank of the low-rank factors."""

    alpha: float = Field(4.0, gt=0)
    """Numerator of their scaling."""

    steps: int = Field(300, ge=1)
    """Updates of every arm."""

    cycle_length: int = Field(50, ge=2)
    """Steps between two merges of ReLoRA."""

    warmup_steps: int = Field(10, ge=0)
    """Steps of linear warm-up."""

    restart_warmup_steps: int = Field(5, ge=0)
    """Steps over which the learning rate climbs back after a merge."""

    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step relative to its peak."""

    learning_rate: float = Field(0.1, gt=0)
    """Peak learning rate. Among 0.03, 0.05, 0.1, 0.2 and 0.3 (seeds 100 to 109) it is the lowest at which full rank has
    converged after these steps. LoRA is as good at 0.2 and ReLoRA a little better at 0.03."""

    reset_ratio: float = Field(0.99, ge=0, le=1)
    """Share of Adam's moments that a merge zeroes, by magnitude."""

    @model_validator(mode="after")
    def rank_is_at_most_the_smaller_side(self) -> Self:
        if self.rank > min(self.inputs, self.outputs):
            raise ValueError(f"rank {self.rank} is more than {min(self.inputs, self.outputs)}, the smaller side of W")
        return self

    @model_validator(mode="after")
    def warmups_fit(self) -> Self:
        if self.steps % self.cycle_length:
            raise ValueError(f"steps {self.steps} are no multiple of cycle_length {self.cycle_length}")
        if self.warmup_steps > self.cycle_length or self.restart_warmup_steps >= self.cycle_length:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must not exceed cycle_length {self.cycle_length}, and "
                f"restart_warmup_steps {self.restart_warmup_steps} must be below it"
            )
        return self


class ThroughputSettings(FrozenConfig):
    """The training steps to measure, and the number of rounds."""

    profiles: tuple[str, ...] = Field(("llama_60m",), min_length=1)
    """Names or paths of profiles; an update is one forward pass of each."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Settings over these profiles."""

    warm_start_share: float = Field(1 / 3, ge=0, le=1)
    """Share of a run's steps that are full rank: 10,000 of 30,000 in the paper's largest run."""

    rounds: int = Field(5, ge=2)
    """Rounds in which full rank and ReLoRA take turns; errors are over them."""

    steps: int = Field(2, ge=1)
    """Training steps of each in a round."""


class PaperThroughput(FrozenConfig):
    """A column of the paper's table 4, in examples a second."""

    where: str
    """The hardware."""

    full: float
    """Full rank."""

    relora: float
    """ReLoRA's cycles."""

    adjusted: float
    """ReLoRA's with the warm start in it, as the paper has it."""

    total_percent: float
    """Gain of the whole run in percent, as the paper has it."""


class TutorialExperiment(FrozenConfig):
    """The file of an experiment of kind 'tutorial'."""

    title: str
    kind: Literal["tutorial"]
    seeds: Seeds = Field(tuple(range(10)), min_length=2)
    tutorial: TutorialSettings = TutorialSettings()


class ThroughputExperiment(FrozenConfig):
    """The file of an experiment of kind 'throughput'."""

    title: str
    kind: Literal["throughput"]
    throughput: ThroughputSettings = ThroughputSettings()
    paper_source: str = ""
    paper: tuple[PaperThroughput, ...] = ()


MeasuredConfig = Annotated[TutorialExperiment | ThroughputExperiment, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[TutorialExperiment | ThroughputExperiment] = TypeAdapter(MeasuredConfig)


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
    strangers = sorted(set(layered(overrides or {})) - {kind})
    if strangers:
        raise ConfigError(
            f"Experiment {path.stem} trains no runs, so {strangers[0]!r} is none of its settings. What can be set over "
            f"it begins with '{kind}.': see profiles/experiments/README.md."
        )
    given = {} if seeds is None else {"seeds": list(seeds)}
    try:
        config = _ADAPTER.validate_python(layered(settings, overrides or {}) | given)
    except ValidationError as error:
        raise invalid_experiment(path, faults_of(error, below=1), where="there or in what goes over it") from None
    return MeasuredExperiment(path.stem, config)


def measured_json(experiment: MeasuredExperiment, measured: Measured) -> str:
    """Return the settings and every number as JSON, to be stored beside the report."""
    record = {
        "experiment": experiment.name,
        "settings": experiment.config.model_dump(mode="json"),
        **measured.model_dump(mode="json"),
    }
    return json.dumps(record, indent=1) + "\n"
