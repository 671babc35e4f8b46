"""Experiments that train no runs: the tutorial's regression, and speed and memory of training steps. Light.

Their files lie beside the others'; a call measures all of it anew, in seconds or minutes, and writes a report of the
same form.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from relora_train.errors import ConfigError
from relora_train.experiments.config import ThroughputExperiment, TutorialExperiment, faults_of, invalid_experiment
from relora_train.experiments.experiment import find_experiment
from relora_train.settings.base import FrozenConfig
from relora_train.settings.keys import layered, settings_digest

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
