"""An experiment as its file has it: arms over a base profile, seeds, a budget, the paper's numbers. Light."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from relora_train.errors import ExperimentInvalidError
from relora_train.settings.base import FrozenConfig

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
    """The arm's name in tables."""

    about: str = ""
    """The purpose of the arm, in a sentence."""

    paper: float | Literal["diverged"] | None = None
    """The paper's number for it, in the experiment's paper_measure."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Settings over the base."""


class ExperimentConfig(FrozenConfig):
    """An experiment as its file has it."""

    title: str
    """The question, in a line."""

    profile: str
    """The base: a shipped profile's name, or a path seen from the experiment's file."""

    budget_tokens: int = Field(ge=1)
    """Tokens that every arm trains on, its warm start included; of images, patches."""

    seeds: Seeds = Field((0, 1, 2), min_length=1)
    """Every arm is trained once with each."""

    reference: str
    """The arm that the others are compared with, seed by seed."""

    paper_source: str = ""
    """The place of the paper's numbers."""

    paper_measure: str = ""
    """The measure of the paper's numbers."""

    search: dict[str, str] = Field(default_factory=dict)
    """The search for the arms' settings: each try and its result, as text for the report."""

    base: dict[str, Any] = Field(default_factory=dict)
    """Settings over the profile, for every arm."""

    arms: dict[ArmName, ArmConfig] = Field(min_length=1)
    """The arms by name, in the order of the tables."""

    @model_validator(mode="after")
    def labels_differ(self) -> Self:
        labels = [arm.label for arm in self.arms.values()]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"several arms are called {twice[0]!r}: tables could not tell them apart")
        return self

    @model_validator(mode="after")
    def reference_is_an_arm(self) -> Self:
        if self.reference not in self.arms:
            raise ValueError(f"reference {self.reference!r} is none of the arms {', '.join(self.arms)}")
        return self

    @model_validator(mode="after")
    def papers_numbers_have_a_source(self) -> Self:
        if any(arm.paper is not None for arm in self.arms.values()) and not (self.paper_source and self.paper_measure):
            raise ValueError("arms have the paper's numbers: say paper_source and paper_measure")
        return self


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
        f"Experiment {path} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n{shown}\n"
        f"Correct them {where}; profiles/experiments/README.md explains every key."
    )
