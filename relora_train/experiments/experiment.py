"""Experiments as data: arms over one base profile, seeds, and one budget in tokens.

An experiment is sparse TOML (profiles/experiments/README.md). Each of its arms at each seed is an ordinary run whose id
follows from its settings. It resumes, retries and is reused like any other, by this experiment and by others. Arms that
begin with the same warm start branch from one run that makes nothing else.
"""

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from relora_train.checkpoints.layout import RUN_ID_PATTERN
from relora_train.errors import ExperimentInvalidError, ProfileInvalidError, ProfileNotFoundError
from relora_train.experiments.config import ExperimentConfig, faults_of, invalid_experiment
from relora_train.method.stages import Stage, fingerprint_settings, plan_stages, until
from relora_train.settings.keys import flatten, layered, settings_digest
from relora_train.settings.load import load_profile, profile_directory
from relora_train.settings.objectives import OBJECTIVES
from relora_train.settings.profile import Profile, unnamed_data_keys
from relora_train.settings.tasks import TaskMeasure
from relora_train.storage.redaction import refuse_secrets
from relora_train.text import did_you_mean

WARM_START = "warm-start"


@dataclass(frozen=True)
class PlannedRun:
    """One arm at one seed, or a warm start that several share."""

    arm: str
    seed: int
    run_id: str
    profile: Profile
    settings: Mapping[str, Any]
    """Over the base profile, by section: what the run is started with."""
    warm_start: str | None
    """Id of the run that it branches from at its warm start; None for an arm that has none."""

    is_warm_start: bool = False
    """A run that makes a warm start for others, and nothing else."""
    measure: TaskMeasure | None = None
    """The experiment's, with an absolute directory."""

    @property
    def stop_after(self) -> str | None:
        """The last stage it trains; None for all of the plan's."""
        return WARM_START if self.is_warm_start else None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that the run trains itself."""
        stages = until(self.stop_after, plan_stages(self.profile))
        return stages[1:] if self.warm_start else stages


@dataclass(frozen=True)
class Experiment:
    """An experiment with every arm resolved."""

    name: str
    config: ExperimentConfig
    profile: str
    """Base profile: a shipped name, or an absolute path."""
    budget_tokens: int
    """Tokens of every arm: the file's number, unless overrides changed it for all."""
    warm_starts: tuple[PlannedRun, ...]
    """Each before any run that branches from it."""
    runs: tuple[PlannedRun, ...]
    """Seed by seed, in each the arms in the file's order: an interrupted experiment has whole seeds first."""
    overrides: Mapping[str, Any]
    is_shipped: bool

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    @property
    def digest(self) -> str:
        """8 hex of all that a report shows: another question has a report of its own, beside the earlier one."""
        settings = {
            "runs": {run.run_id: run.profile.evaluation.model_dump(mode="json") for run in self.runs},
            "config": self.config.model_dump(mode="json", exclude={"seeds"}),
        }
        if self.config.measure is None:  # reports from before there was one keep their places
            del settings["config"]["measure"]
        return settings_digest(settings)[:8]

    @property
    def command_name(self) -> str:
        """The argument of `relora compare`: a shipped name, or the file's."""
        return self.name if self.is_shipped else f"{self.name}.toml"

    @property
    def unreached(self) -> Mapping[str, tuple[str, ...]]:
        """Overridden keys that some arms set themselves, and which arms these are: theirs stay as they are."""
        found = {
            key: tuple(n for n, arm in self.config.arms.items() if key in flatten(layered(arm.set)))
            for key in sorted(flatten(dict(self.overrides)))
        }
        return {key: arms for key, arms in found.items() if arms}

    def waves(self, runs: Sequence[PlannedRun], *, together: bool) -> list[list[PlannedRun]]:
        """These runs and the warm starts that they branch from, in an order in which they can be trained.

        together: as much as possible at a time: all warm starts, then all runs. Otherwise they run one after another.
        """
        needed = {run.warm_start for run in runs}
        starts = [start for start in self.warm_starts if start.run_id in needed]
        if together:
            return [wave for wave in (starts, list(runs)) if wave]
        ordered: list[PlannedRun] = []
        for run in runs:
            ordered += [s for s in starts if s.run_id == run.warm_start and s not in ordered]
            ordered.append(run)
        return [[run] for run in ordered]

    def parameters(self, run: PlannedRun, *, store_uri: str, gpu_limit: str | None) -> dict[str, Any]:
        """Return the parameters of the flow pretrain for one of the runs, as plain JSON values."""
        return {
            "profile": self.profile,
            "overrides": dict(run.settings),
            "run_id": run.run_id,
            "store": store_uri,
            "resume_from": f"{run.warm_start}@{WARM_START}" if run.warm_start else None,
            "gpu_limit": gpu_limit,
            "stop_after": run.stop_after,
        }


def experiment_directory() -> Path:
    """Return the experiments that ship with the project."""
    return profile_directory() / "experiments"


def list_experiments() -> list[Path]:
    """Paths of the shipped experiments, by name."""
    return sorted(experiment_directory().glob("*.toml"))


def load_experiment(
    name_or_path: str | Path, overrides: Mapping[str, Any] | None = None, seeds: Sequence[int] | None = None
) -> Experiment:
    """Resolve a shipped experiment's name, or a path to a TOML file.

    overrides go over the base and under the arms: see Experiment.unreached. With overrides the arms may come to another
    budget than the file's, all to the same.
    Raises ExperimentInvalidError with all faults at once, ProfileNotFoundError, ConfigError.
    """
    path, place = find_experiment(name_or_path), "there or in what goes over it"
    instead = {"seeds": list(seeds)} if seeds else {}
    try:
        config = ExperimentConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")) | instead)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentInvalidError(f"{path} is not valid TOML: {error}. Correct the file and run again.") from None
    except ValidationError as error:
        raise invalid_experiment(path, faults_of(error), where=place if instead else "there") from None
    profile = config.profile
    if profile.endswith(".toml"):
        beside = path.parent / profile
        if not beside.is_file():
            raise ProfileNotFoundError(f"{path}: its profile {beside} is not there. Correct `profile` or put it there.")
        profile = str(beside.resolve())
    given = layered(overrides or {})
    arms = {f"arms.{name}.set.": layered(arm.set) for name, arm in config.arms.items()}
    faults = [
        f"{prefix}{key} cannot be set in an experiment: seeds are given by `seeds` or --seeds, names follow"
        for prefix, settings in {"": given, "base.": layered(config.base), **arms}.items()
        for key in ("seed", "name")
        if key in settings
    ]
    runs: list[PlannedRun] = []
    measure = config.measure
    if measure is not None and measure.include is not None:
        measure = measure.model_copy(update={"include": str(path.parent / Path(measure.include).expanduser())})
    for seed, (name, arm) in itertools.product(config.seeds, config.arms.items()):
        try:
            base, named = Path(profile).stem, f"{Path(profile).stem}-{name}-s{seed}"
            own = layered(config.base, given, arm.set, {"seed": seed, "name": named})
            resolved = load_profile(profile, own)
            first = plan_stages(resolved)[0]
            # Runs whose warm start is the same branch from the same run.
            start = f"{base}-{WARM_START}-s{seed}-{_digest(resolved, [first])}" if first.kind == "warm_start" else None
            runs.append(PlannedRun(name, seed, f"{named}-{_digest(resolved)}", resolved, own, start, measure=measure))
        except ProfileInvalidError as error:
            if seed == config.seeds[0]:
                faults += [f"arms.{name}: {fault}" for fault in error.faults or (str(error),)]
    if measure and runs and not OBJECTIVES[runs[0].profile.objective].has_tasks:
        faults.append(f"measure: tasks are for language models, and the objective is {runs[0].profile.objective!r}")
    budget = run_tokens(runs[0].profile) if given and runs else config.budget_tokens
    if not faults:
        faults = [
            f"arms.{run.arm}: {run.profile.schedule.total_steps:,} steps of {run.profile.batch.tokens:,} tokens are "
            f"{run_tokens(run.profile):,}, not the common budget of {budget:,}"
            for run in runs
            if run.seed == runs[0].seed and run_tokens(run.profile) != budget
        ]
    if faults:
        raise invalid_experiment(path, faults, where=place)
    starts: dict[str, PlannedRun] = {}
    for run in runs:
        if run.warm_start is not None and run.warm_start not in starts:
            name = run.warm_start.rpartition("-")[0]
            settings, renamed = layered(run.settings, {"name": name}), run.profile.model_copy(update={"name": name})
            starts[run.warm_start] = PlannedRun(
                WARM_START, run.seed, run.warm_start, renamed, settings, None, is_warm_start=True
            )
    shipped = path in list_experiments()
    return Experiment(path.stem, config, profile, budget, tuple(starts.values()), tuple(runs), given, shipped)


def run_tokens(profile: Profile) -> int:
    """Tokens that a run of this profile trains on, its warm start included."""
    return profile.schedule.total_steps * profile.batch.tokens


def find_experiment(name_or_path: str | Path) -> Path:
    """Return the path of a shipped experiment, or the path given. Raises ProfileNotFoundError."""
    path, shipped = Path(refuse_secrets(str(name_or_path))), {entry.stem: entry for entry in list_experiments()}
    if isinstance(name_or_path, str) and name_or_path in shipped:
        return shipped[name_or_path]
    if path.is_file():
        if path.suffix != ".toml" or not re.fullmatch(RUN_ID_PATTERN, path.stem):
            raise ExperimentInvalidError(
                f"{path} cannot be an experiment's file by its name, which its report's folder gets: 1 to 100 letters, "
                "digits, '.', '_' and '-', beginning with a letter or a digit, and .toml. Rename it."
            )
        return path.resolve()
    hint = did_you_mean(str(name_or_path), shipped)
    raise ProfileNotFoundError(
        f"There is no experiment {str(name_or_path)!r}, neither shipped nor as a file.{hint} "
        f"Shipped: {', '.join(shipped)}. Give one of these or the path of a TOML file."
    )


def _digest(profile: Profile, stages: Sequence[Stage] | None = None) -> str:
    """8 hex of all that can change what the stages (all of the plan's) compute, and of nothing else."""
    unnamed = unnamed_data_keys(profile)
    settings = {
        "stages": [fingerprint_settings(profile, stage, dataset_id="") for stage in stages or plan_stages(profile)],
        "tokenizer": profile.tokenizer.model_dump(mode="json", exclude=unnamed["tokenizer"]),
        "data": profile.data.model_dump(mode="json", exclude=unnamed["data"]),
    }
    return settings_digest(settings)[:8]
