"""From the runs of an experiment to a table over seeds, and paired differences. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from relora_train.errors import RunSettingsChangedError
from relora_train.experiments.experiment import Experiment
from relora_train.experiments.records import (
    ArmResult,
    Comparison,
    Difference,
    RunResult,
)
from relora_train.reports.statistics import Estimate, estimate, paired_difference
from relora_train.settings.objectives import SCORES

_AVERAGED = (
    *SCORES,
    *("tokens_per_second", "tokens_per_second_in_all", "peak_memory_bytes", "seconds"),
)


def compare_results(experiment: Experiment, results: Sequence[RunResult]) -> Comparison:
    """Return the table and the differences. Pure.

    Raises RunSettingsChangedError for arms that were trained on different datasets: they cannot be compared.
    """
    _check_one_dataset(results)
    config = experiment.config
    arms = tuple(_arm_result(name, experiment, results) for name in config.arms)
    return Comparison(
        experiment=experiment.name,
        command_name=experiment.command_name,
        title=config.title,
        objective=experiment.runs[0].profile.objective,
        profile=experiment.profile,
        digest=experiment.digest,
        budget_tokens=experiment.budget_tokens,
        full_budget_tokens=config.budget_tokens,
        seeds=experiment.seeds,
        reference=config.reference,
        paper_source=config.paper_source,
        paper_measure=config.paper_measure,
        overrides=dict(experiment.overrides),
        unreached=dict(experiment.unreached),
        base=config.base,
        changes={name: arm.set for name, arm in config.arms.items()},
        search=config.search,
        arms=arms,
        differences=tuple(_difference(name, config.reference, results) for name in config.arms),
        runs=tuple(results),
    )


def _check_one_dataset(results: Sequence[RunResult]) -> None:
    by_dataset: dict[str, list[str]] = {}
    for result in results:
        if result.dataset_id is not None:
            by_dataset.setdefault(result.dataset_id, []).append(result.run_id)
    if len(by_dataset) > 1:
        shown = "".join(f"\n  - {dataset[:12]}: {', '.join(runs)}" for dataset, runs in by_dataset.items())
        raise RunSettingsChangedError(
            f"The arms were trained on different data, so they cannot be compared (dataset: runs):{shown}\n"
            "The source changed between two runs of the experiment. Run it in another store, or delete the runs on the "
            "data that is gone."
        )


def _arm_result(name: str, experiment: Experiment, results: Sequence[RunResult]) -> ArmResult:
    config = experiment.config.arms[name]
    of_arm = [result for result in results if result.arm == name]
    trained = [result for result in of_arm if result.outcome == "trained"]

    resets = [result.resets for result in of_arm if result.resets]  # of those that diverged later, too

    ratios = [[size.ratio for size in sizes if size.ratio is not None] for sizes in resets]

    def over_seeds(field: str) -> Estimate | None:
        values = [getattr(result, field) for result in trained]
        return estimate([float(value) for value in values if value is not None and math.isfinite(value)])

    return ArmResult(
        arm=name,
        label=config.label,
        about=config.about,
        paper=config.paper,
        trained=len(trained),
        diverged=len(of_arm) - len(trained),
        **{field: over_seeds(field) for field in _AVERAGED},
        largest_first_change=estimate([max(size.largest_change for size in sizes) for sizes in resets]),
        first_change_ratio=estimate([max(found) for found in ratios if found]),
        largest_a_move=estimate([max(size.largest_a_move for size in sizes) for sizes in resets]),
        trainable_parameters=of_arm[0].trainable_parameters if of_arm else None,
        parameters=of_arm[0].parameters if of_arm else None,
    )


def _difference(arm: str, reference: str, results: Sequence[RunResult]) -> Difference:
    def by_seed(name: str, field: str) -> dict[int, float]:
        return {
            result.seed: getattr(result, field)
            for result in results
            if result.arm == name and result.outcome == "trained" and getattr(result, field) is not None
        }

    values = {
        field: paired_difference(by_seed(arm, field), by_seed(reference, field))
        for field in ("val_loss", "val_perplexity", "val_accuracy")
    }
    return Difference(arm=arm, **values)
