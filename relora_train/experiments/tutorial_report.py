"""The tutorial's result: tables, numbers, a verdict and the figure of its losses. Imports torch."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from relora_train.experiments.measured import Measured, MeasuredTable, TutorialExperiment
from relora_train.experiments.tutorial import ARMS, Floats, TutorialResult, run_tutorial
from relora_train.reports.plot_style import ACCENT, MUTED, SERIES, legend, log_scale, new_figure, to_png
from relora_train.reports.statistics import Estimate, estimate

PAIRS = (("relora", "full"), ("lora", "relora"), ("lora", "full"))
"""Arms whose difference is shown, first less second."""
_FIGURE = "losses.png"


def measure_tutorial(config: TutorialExperiment) -> tuple[Measured, dict[str, bytes]]:
    """Train the arms over the experiment's seeds; return tables and numbers, and the figure of the losses."""
    result = run_tutorial(config.seeds, config.tutorial)
    return measured_tutorial(result), {_FIGURE: to_png(losses_figure(result), dpi=160)}


def measured_tutorial(result: TutorialResult) -> Measured:
    """Return the result in words, tables and numbers."""
    settings, best, bound = result.settings, float(result.best.mean()), float(result.best_low_rank.mean())
    means = {arm: _mean(result.final(arm)) for arm in ARMS}
    differences = {pair: result.difference(*pair) for pair in PAIRS}
    losses = [
        (title, f"{mean.mean:.6f}", f"{mean.standard_error:.6f}", f"{(finals - result.best).mean():.1e}",
         f"{finals.min():.6f}", f"{finals.max():.6f}")
        for (arm, title), mean in zip(ARMS.items(), means.values(), strict=True) for finals in [result.final(arm)]
    ]  # fmt: skip
    losses += [
        ("best possible", f"{best:.6f}", "", "0", "", ""),
        (f"best with rank {settings.rank}", f"{bound:.6f}", "", f"{bound - best:.1e}", "", ""),
    ]
    pairs = [
        (f"{ARMS[one]} − {ARMS[other]}", f"{gap.mean:+.2e}", f"{gap.standard_error:.1e}",
         f"{int((result.final(one) > result.final(other)).sum())} of {gap.count}")
        for (one, other), gap in differences.items()
    ]  # fmt: skip
    return Measured(
        headline=verdict(result),
        facts=f"{settings.samples} x {settings.inputs} → {settings.outputs}, rank {settings.rank} · {settings.steps} "
        f"steps, merged every {settings.cycle_length} · {len(result.seeds)} seeds",
        tables=(
            MeasuredTable(
                title="Losses",
                header=("arm", "final loss", "± s.e.", "above the best", "lowest seed", "highest seed"),
                rows=tuple(losses),
                note="Mean squared error on the training data after the last update; mean and standard error over "
                "seeds.",
            ),
            MeasuredTable(
                title="Paired differences of final losses",
                header=("pair", "mean", "± s.e.", "seeds above 0"),
                rows=tuple(pairs),
                note="The first less the second, seed by seed: what a seed does to both cancels.",
            ),
        ),
        captions={
            _FIGURE: (
                "Losses",
                "Geometric mean over the seeds strong, each seed faint. Dotted: the least loss that any weight can "
                "reach, and the least that an update of this rank can.",
            )
        },
        numbers={
            "settings": settings.model_dump(mode="json"),
            "seeds": list(result.seeds),
            "final_loss": {arm: result.final(arm).tolist() for arm in ARMS},
            "best_loss": result.best.tolist(),
            "best_loss_of_low_rank": result.best_low_rank.tolist(),
            "mean_final_loss": {arm: mean.model_dump() for arm, mean in means.items()},
            "paired_differences": [
                {"arm": one, "reference": other, **gap.model_dump()} for (one, other), gap in differences.items()
            ],
        },
    )


def verdict(result: TutorialResult) -> str:
    """Return what the numbers say, whatever they are."""
    gap, lost = result.difference("lora", "relora"), result.difference("relora", "full")
    ends = "ends" if gap.mean > 0 and gap.differs_from_zero() else "does not end"
    first = f"ReLoRA {ends} below LoRA by more than two standard errors."
    if not lost.differs_from_zero():
        return f"{first} Full rank and ReLoRA cannot be told apart."
    share, side = abs(lost.mean) / float(result.best.mean()), "above" if lost.mean > 0 else "below"
    return f"{first} ReLoRA ends {side} full rank, by {share:.1g} of the smallest possible loss."


def losses_figure(result: TutorialResult) -> Figure:
    """Draw the geometric mean over the seeds strong, each seed faint; dotted the least losses, dashed the merges."""
    figure, grid = new_figure(4.0)
    axes, settings = grid[0, 0], result.settings
    for (arm, title), colour in zip(ARMS.items(), SERIES, strict=True):
        axes.plot(result.losses[arm].T, color=colour, linewidth=0.5, alpha=0.25)
        axes.plot(np.exp(np.log(result.losses[arm]).mean(axis=0)), color=colour, linewidth=2.0, label=title)
    for floor, label in (
        (result.best_low_rank, f"best with an update of rank {settings.rank}"),
        (result.best, "best possible"),
    ):
        level = float(np.exp(np.log(floor).mean()))
        axes.axhline(level, color=MUTED, linestyle=":", linewidth=1.2)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (-4, 4), "textcoords": "offset points"}
        axes.annotate(label, (1.0, level), ha="right", fontsize=8.5, color=MUTED, **place)
    for merge in range(settings.cycle_length, settings.steps + 1, settings.cycle_length):
        axes.axvline(merge, color=ACCENT, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
    log_scale(axes.yaxis, axes)
    axes.set_xlim(0, settings.steps * 1.01)
    axes.set_xlabel("step; dashed: merges of ReLoRA")
    axes.set_ylabel("mean squared error")
    legend(axes)
    return figure


def _mean(values: Floats) -> Estimate:
    found = estimate(values.tolist())
    assert found is not None, "there are two seeds at least"  # noqa: S101  # for the type checker
    return found
