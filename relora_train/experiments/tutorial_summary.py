"""What the tutorial's arms came to: means, paired differences, a verdict, and its figure. Imports torch."""

from __future__ import annotations

from typing import Any, cast

from relora_train.experiments.measured import Measured, MeasuredTable, TutorialExperiment
from relora_train.experiments.tutorial import ARMS, Arm, TutorialResult, run_tutorial
from relora_train.experiments.tutorial_plot import tutorial_figure
from relora_train.reports.plot_style import DARK, LIGHT, to_png
from relora_train.reports.statistics import Estimate, estimate, paired_difference

FIGURE_NAME = "losses.png"
_TITLES: dict[Arm, str] = {"full": "full rank", "relora": "ReLoRA", "lora": "LoRA"}
PAIRS: tuple[tuple[Arm, Arm], ...] = (("relora", "full"), ("lora", "relora"), ("lora", "full"))
"""Arms whose difference is shown, first minus second."""

Pictures = dict[str, tuple[bytes, bytes]]
"""PNG bytes for light and dark pages by file name."""


def measure_tutorial(config: TutorialExperiment) -> tuple[Measured, Pictures]:
    """Train the arms over the experiment's seeds; tables, numbers and the losses' figure."""
    result = run_tutorial(config.seeds, config.tutorial)
    light, dark = (to_png(tutorial_figure(result, _TITLES, theme), theme, dpi=160) for theme in (LIGHT, DARK))
    return measured_tutorial(result), {FIGURE_NAME: (light, dark)}


def measured_tutorial(result: TutorialResult) -> Measured:
    """The result in words, tables and numbers."""
    settings, seeds = result.settings, result.seeds
    shape = f"{settings.samples} x {settings.inputs} → {settings.outputs}, rank {settings.rank}"
    return Measured(
        headline=verdict(result),
        facts=f"{shape} · {settings.steps} steps, merged every {settings.cycle_length} · {len(seeds)} seeds",
        tables=tutorial_tables(result),
        captions={
            FIGURE_NAME: (
                "Losses",
                "Geometric mean over the seeds strong, each seed faint. Dotted: the least loss that any weight can "
                "reach, and the least that an update of this rank can.",
            )
        },
        numbers=tutorial_record(result),
    )


def tutorial_record(result: TutorialResult) -> dict[str, Any]:
    """Settings, the losses after the last update by arm and seed, their means and paired differences."""
    return {
        "settings": result.settings.model_dump(mode="json"),
        "seeds": list(result.seeds),
        "final_loss": {arm: [float(loss) for loss in result.final(arm)] for arm in ARMS},
        "best_loss": [float(loss) for loss in result.best],
        "best_loss_of_low_rank": [float(loss) for loss in result.best_low_rank],
        "mean_final_loss": {arm: _estimate(result, arm).model_dump() for arm in ARMS},
        "paired_differences": [
            {"arm": arm, "reference": reference, **difference(result, arm, reference).model_dump()}
            for arm, reference in PAIRS
        ],
    }


def difference(result: TutorialResult, arm: Arm, reference: Arm) -> Estimate:
    """Of the losses after the last update, paired by seed."""
    first, second = (dict(zip(result.seeds, map(float, result.final(name)), strict=True)) for name in (arm, reference))
    return cast(Estimate, paired_difference(first, second))  # never None: the seeds are the same


def tutorial_tables(result: TutorialResult) -> tuple[MeasuredTable, MeasuredTable]:
    """The arms, and their paired differences."""
    rows = []
    for arm in ARMS:
        mean, finals = _estimate(result, arm), result.final(arm)
        above = f"{result.excess(arm).mean():.1e}"
        ends = f"{finals.min():.6f}", f"{finals.max():.6f}"
        rows.append((_TITLES[arm], f"{mean.mean:.6f}", _error(mean), above, *ends))
    rows.append(("best possible", f"{result.best.mean():.6f}", "", "0", "", ""))
    bound = f"best with rank {result.settings.rank}"
    above = f"{(result.best_low_rank - result.best).mean():.1e}"
    rows.append((bound, f"{result.best_low_rank.mean():.6f}", "", above, "", ""))
    header = ("arm", "final loss", "± s.e.", "above the best", "lowest seed", "highest seed")
    note = "Mean squared error on the training data after the last update; mean and standard error over seeds."
    pairs = []
    for arm, reference in PAIRS:
        found = difference(result, arm, reference)
        above_zero = int((result.final(arm) > result.final(reference)).sum())
        title = f"{_TITLES[arm]} − {_TITLES[reference]}"
        pairs.append((title, f"{found.mean:+.2e}", _error(found, exponent=True), f"{above_zero} of {found.count}"))
    return (
        MeasuredTable(title="Losses", header=header, rows=tuple(rows), note=note),
        MeasuredTable(
            title="Paired differences of final losses",
            header=("pair", "mean", "± s.e.", "seeds above 0"),
            rows=tuple(pairs),
            note="The first less the second, seed by seed: what a seed does to both cancels.",
        ),
    )


def verdict(result: TutorialResult) -> str:
    """What the numbers say, whatever they are."""
    gap = difference(result, "lora", "relora")
    lost = difference(result, "relora", "full")
    if gap.mean > 0 and gap.differs_from_zero():
        first = "ReLoRA ends below LoRA by more than two standard errors."
    else:
        first = "ReLoRA does not end below LoRA by more than two standard errors."
    share = abs(lost.mean) / float(result.best.mean())
    if not lost.differs_from_zero():
        second = "Full rank and ReLoRA cannot be told apart."
    else:
        side = "above" if lost.mean > 0 else "below"
        second = f"ReLoRA ends {side} full rank, by {share:.1g} of the smallest possible loss."
    return f"{first} {second}"


def _estimate(result: TutorialResult, arm: Arm) -> Estimate:
    return cast(Estimate, estimate([float(loss) for loss in result.final(arm)]))  # never None: there are seeds


def _error(value: Estimate, *, exponent: bool = False) -> str:
    if value.standard_error is None:
        return "–"
    return f"{value.standard_error:.1e}" if exponent else f"{value.standard_error:.6f}"
