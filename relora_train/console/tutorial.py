"""`relora tutorial`: LoRA against ReLoRA on a regression, as a table, JSON and a figure. Imports torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from rich.text import Text

from relora_train.console.tables import BLANK, View, add_row, table
from relora_train.statistics import Estimate, estimate, paired_difference
from relora_train.tutorial import ARMS, Arm, TutorialResult

RECORD_NAME = "tutorial.json"
FIGURE_NAME = "tutorial.png"
_TITLES: dict[Arm, str] = {"full": "full rank", "relora": "ReLoRA", "lora": "LoRA"}
PAIRS: tuple[tuple[Arm, Arm], ...] = (("relora", "full"), ("lora", "relora"), ("lora", "full"))
"""Arms whose difference is shown, first minus second."""


def tutorial_record(result: TutorialResult) -> dict[str, Any]:
    """Settings, the losses after the last update by arm and seed, their means and paired differences."""
    return {
        "settings": asdict(result.settings),
        "seeds": result.seeds,
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


def tutorial_view(result: TutorialResult) -> View:
    """The arms, their paired differences, and what that comes to."""
    made = table("arm", "final loss", "± s.e.", "above the best", "lowest seed", "highest seed")
    for arm in ARMS:
        mean, finals = _estimate(result, arm), result.final(arm)
        above = estimate([float(value) for value in result.excess(arm)])
        add_row(
            made, _TITLES[arm], f"{mean.mean:.6f}", _error(mean), f"{above.mean:.1e}" if above else "–",
            f"{finals.min():.6f}", f"{finals.max():.6f}",
        )  # fmt: skip
    add_row(made, "best possible", f"{result.best.mean():.6f}", "", "0", "", "")
    name = f"best with rank {result.settings.rank}"
    add_row(
        made,
        name,
        f"{result.best_low_rank.mean():.6f}",
        "",
        f"{(result.best_low_rank - result.best).mean():.1e}",
        "",
        "",
    )
    pairs = table("paired difference of final losses", "mean", "± s.e.", "seeds above 0")
    for arm, reference in PAIRS:
        found = difference(result, arm, reference)
        above_zero = int((result.final(arm) > result.final(reference)).sum())
        title = f"{_TITLES[arm]} − {_TITLES[reference]}"
        add_row(pairs, title, f"{found.mean:+.2e}", _error(found, exponent=True), f"{above_zero} of {found.count}")
    return [made, BLANK, pairs, BLANK, Text(verdict(result))]


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


def write_tutorial(result: TutorialResult, directory: Path) -> list[Path]:
    """Write tutorial.json and tutorial.png; return their paths."""
    from relora_train.reporting.plot_style import LIGHT, to_png
    from relora_train.reporting.tutorial_plot import tutorial_figure

    directory.mkdir(parents=True, exist_ok=True)
    record, figure = directory / RECORD_NAME, directory / FIGURE_NAME
    record.write_text(json.dumps(tutorial_record(result), indent=1) + "\n", encoding="utf-8")
    figure.write_bytes(to_png(tutorial_figure(result, _TITLES, LIGHT), LIGHT, dpi=160))
    return [record, figure]


def _estimate(result: TutorialResult, arm: Arm) -> Estimate:
    return cast(Estimate, estimate([float(loss) for loss in result.final(arm)]))  # never None: there are seeds


def _error(value: Estimate, *, exponent: bool = False) -> str:
    if value.standard_error is None:
        return "–"
    return f"{value.standard_error:.1e}" if exponent else f"{value.standard_error:.6f}"
