"""The figure of the tutorial: every arm's loss by step, over the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from relora_train.reports.plot_style import Theme, legend, log_scale, new_figure

if TYPE_CHECKING:
    from relora_train.experiments.tutorial import Arm, TutorialResult  # torch


def tutorial_figure(result: TutorialResult, titles: Mapping[Arm, str], theme: Theme) -> Figure:
    """Geometric mean over the seeds strong, each seed faint. Dotted: the least loss, with the rank bounded and not."""
    figure, grid = new_figure(theme, 4.0)
    axes, settings = grid[0, 0], result.settings
    steps = np.arange(settings.steps + 1)
    for (arm, title), colour in zip(titles.items(), theme.series, strict=True):
        losses = result.losses[arm]
        axes.plot(steps, losses.T, color=colour, linewidth=0.5, alpha=0.25)
        axes.plot(steps, np.exp(np.log(losses).mean(axis=0)), color=colour, linewidth=2.0, label=title)
    for floor, label in (
        (result.best_low_rank, f"best with an update of rank {settings.rank}"),
        (result.best, "best possible"),
    ):
        level = float(np.exp(np.log(floor).mean()))
        axes.axhline(level, color=theme.muted, linestyle=":", linewidth=1.2)
        axes.annotate(
            label, (1.0, level), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points",
            ha="right", fontsize=8.5, color=theme.muted,
        )  # fmt: skip
    for merge in range(settings.cycle_length, settings.steps + 1, settings.cycle_length):
        axes.axvline(merge, color=theme.accent, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
    log_scale(axes.yaxis, axes)
    axes.set_xlim(0, settings.steps * 1.01)
    axes.set_xlabel("step; dashed: merges of ReLoRA")
    axes.set_ylabel("mean squared error")
    legend(axes, theme)
    return figure
