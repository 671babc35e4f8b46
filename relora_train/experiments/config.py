"""The files of experiments.

One kind compares arms over a base profile at one budget; the others train no runs and say so by `kind`.
profiles/experiments/README.md explains every key.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from relora_train.errors import ExperimentInvalidError
from relora_train.settings.base import FrozenConfig
from relora_train.settings.tasks import TaskMeasure
from relora_train.text import counted

ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,39}$")]
"""Part of run ids."""


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{list(seeds)} name one twice")
    return seeds


Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31, strict=True)], ...], AfterValidator(_each_once)]
"""The seeds of an experiment, in the order of training."""


class ArmConfig(FrozenConfig):
    """One arm: what it changes in the base, and what the paper has for it."""

    label: str = Field(min_length=1)
    about: str = ""
    paper: float | Literal["diverged"] | None = None
    set: dict[str, Any] = Field(default_factory=dict)


class ExperimentConfig(FrozenConfig):
    """An experiment as its file has it."""

    title: str
    profile: str
    budget_tokens: int = Field(ge=1)
    seeds: Seeds = Field((0, 1, 2), min_length=1)
    reference: str
    paper_source: str = ""
    paper_measure: str = ""
    measure: TaskMeasure | None = None
    search: dict[str, str] = Field(default_factory=dict)
    base: dict[str, Any] = Field(default_factory=dict)
    arms: dict[ArmName, ArmConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def arms_fit(self) -> Self:
        labels = [arm.label for arm in self.arms.values()]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"several arms are called {twice[0]!r}: tables could not tell them apart")
        if self.reference not in self.arms:
            raise ValueError(f"reference {self.reference!r} is none of the arms {', '.join(self.arms)}")
        if any(arm.paper is not None for arm in self.arms.values()) and not (self.paper_source and self.paper_measure):
            raise ValueError("arms have the paper's numbers: say paper_source and paper_measure")
        return self


class TutorialSettings(FrozenConfig):
    """The regression y = x Wᵀ + noise and its training; the same for all arms but for the learning rate's shape."""

    samples: int = Field(200, ge=1)
    inputs: int = Field(10, ge=1)
    outputs: int = Field(5, ge=1)
    noise: float = Field(0.1, ge=0)
    rank: int = Field(4, ge=1)
    alpha: float = Field(4.0, gt=0)
    steps: int = Field(300, ge=1)
    cycle_length: int = Field(50, ge=2)
    warmup_steps: int = Field(10, ge=0)
    restart_warmup_steps: int = Field(5, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    learning_rate: float = Field(0.1, gt=0)
    reset_ratio: float = Field(0.99, ge=0, le=1)

    @model_validator(mode="after")
    def rank_and_steps_fit(self) -> Self:
        if self.rank > min(self.inputs, self.outputs):
            raise ValueError(f"rank {self.rank} is more than {min(self.inputs, self.outputs)}, the smaller side of W")
        if self.steps % self.cycle_length:
            raise ValueError(f"steps {self.steps} are no multiple of cycle_length {self.cycle_length}")
        if self.warmup_steps > self.cycle_length or self.restart_warmup_steps >= self.cycle_length:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must not exceed cycle_length {self.cycle_length}, and "
                f"restart_warmup_steps {self.restart_warmup_steps} must be below it"
            )
        return self


class TutorialExperiment(FrozenConfig):
    """The file of an experiment of kind 'tutorial'."""

    title: str
    kind: Literal["tutorial"]
    seeds: Seeds = Field(tuple(range(10)), min_length=2)
    tutorial: TutorialSettings = TutorialSettings()


class ThroughputSettings(FrozenConfig):
    """The training steps to measure, and the number of rounds."""

    profiles: tuple[str, ...] = Field(("llama_60m",), min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)
    warm_start_share: float = Field(1 / 3, ge=0, le=1)
    rounds: int = Field(5, ge=2)
    steps: int = Field(2, ge=1)


class PaperThroughput(FrozenConfig):
    """A column of the paper's table 4, in examples a second."""

    where: str
    full: float
    relora: float
    adjusted: float
    total_percent: float


class ThroughputExperiment(FrozenConfig):
    """The file of an experiment of kind 'throughput'."""

    title: str
    kind: Literal["throughput"]
    throughput: ThroughputSettings = ThroughputSettings()
    paper_source: str = ""
    paper: tuple[PaperThroughput, ...] = ()


def faults_of(error: ValidationError, *, below: int = 0) -> list[str]:
    """Return 'key: what is wrong' of each, the key without so many of its first parts; 'file' for the whole."""
    return [
        f"{'.'.join(map(str, fault['loc'][below:])) or 'file'}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in error.errors()
    ]


def invalid_experiment(path: Path, faults: Sequence[str], *, where: str) -> ExperimentInvalidError:
    """Return the error that names all of an experiment's faults, and where to correct them."""
    shown = "\n".join(f"  - {fault}" for fault in faults)
    return ExperimentInvalidError(
        f"Experiment {path} has {counted(len(faults), 'fault')}:\n{shown}\n"
        f"Correct them {where}; profiles/experiments/README.md explains every key."
    )
