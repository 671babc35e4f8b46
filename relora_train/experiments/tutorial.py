"""ReLoRA in one screen: a regression y = x Wᵀ + noise whose best update has a higher rank than the low-rank factors.

Three arms start alike on the same data: full rank, LoRA (one update of rank 4), ReLoRA (the same, merged every 50 of
300 steps). W is 5 × 10 and drawn independently of the start, so the best update has rank 5. LoRA must leave its
smallest direction out, while the merged updates of ReLoRA add up. Everything is done with this library's own functions.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from relora_train.experiments.config import TutorialSettings
from relora_train.experiments.measured import Measured, MeasuredTable
from relora_train.method.layer import lora_parameters
from relora_train.method.merge import merge_and_reinit
from relora_train.method.reset import reset_optimizer_state
from relora_train.method.schedule import jagged_cosine
from relora_train.method.wrap import apply_relora
from relora_train.reports.plot_style import ACCENT, MUTED, SERIES, Floats, legend, log_scale, new_figure, to_png
from relora_train.reports.statistics import Estimate, estimate
from relora_train.reports.text import estimate_text, signed_estimate_text
from relora_train.settings.method import OptimizerConfig
from relora_train.training.optimizer import build_optimizer

ARMS = {"full": "full rank", "relora": "ReLoRA", "lora": "LoRA"}


@dataclass(frozen=True, eq=False)
class TutorialResult:
    """Mean squared errors on the training data, by seed."""

    losses: dict[str, Floats]
    """(seeds, steps + 1) by arm: before the first and after each update."""
    best: Floats
    """(seeds,): the least-squares loss, which no weight can beat."""
    best_low_rank: Floats
    """(seeds,): the smallest loss that any start + update of the settings' rank reaches."""

    def final(self, arm: str) -> Floats:
        return self.losses[arm][:, -1]

    def difference(self, arm: str, reference: str) -> Estimate:
        """Return the first less the second, paired by seed: what a seed does to both cancels."""
        return cast(Estimate, estimate((self.final(arm) - self.final(reference)).tolist()))


def run_tutorial(seeds: Sequence[int], settings: TutorialSettings) -> TutorialResult:
    """Train the three arms for each seed; a function of its arguments alone."""
    samples, inputs, outputs = settings.samples, settings.inputs, settings.outputs
    losses: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    floors, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # products this small gain nothing from more, and threads that wait for others lose all
    try:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            x, weight = (torch.randn(rows, inputs, generator=generator) for rows in (samples, outputs))
            y = x @ weight.T + settings.noise * torch.randn(samples, outputs, generator=generator)
            start = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
            floors.append(least_losses(x, y, start, rank=settings.rank))
            for arm, curves in losses.items():
                curves.append(train(arm, x, y, start, seed, settings))
    finally:
        torch.set_num_threads(threads)
    return TutorialResult({arm: np.array(curves) for arm, curves in losses.items()}, *np.array(floors).T)


def train(arm: str, x: Tensor, y: Tensor, start: Tensor, seed: int, settings: TutorialSettings) -> list[float]:
    """Return the losses of one arm: the loop of a language model's training, without the pipeline."""
    linear, peak = nn.Linear(settings.inputs, settings.outputs, bias=False), settings.learning_rate
    linear.weight = nn.Parameter(start.clone())
    model = nn.Sequential(OrderedDict(linear=linear))
    if arm != "full":
        apply_relora(model, rank=settings.rank, alpha=settings.alpha, dropout=0.0, target_modules=["linear"], seed=seed)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=peak))
    shape = settings.model_dump(include={"warmup_steps", "restart_warmup_steps", "min_lr_ratio"})
    losses, ratio = [], settings.reset_ratio
    for step in range(settings.steps):
        loss = nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        cycle, done = 1 + step // settings.cycle_length, step % settings.cycle_length
        restarted_at = step - done if arm == "relora" else 0
        for group in optimizer.param_groups:
            group["lr"] = peak * jagged_cosine(step, cycle_start=restarted_at, total_steps=settings.steps, **shape)
        optimizer.step()
        if arm == "relora" and done == settings.cycle_length - 1:
            merge_and_reinit(model, cycle=cycle, seed=seed)
            reset_optimizer_state(optimizer, lora_parameters(model), mode="magnitude", ratio=ratio, cycle=cycle)
    with torch.no_grad():
        return [*losses, nn.functional.mse_loss(model(x), y).item()]


def least_losses(x: Tensor, y: Tensor, start: Tensor, *, rank: int) -> tuple[float, float]:
    """Return the least-squares loss, and the smallest with an update of this rank: Eckart and Young, metric of x.

    ‖X (Ŵ − W_start − ΔW)ᵀ‖ is least for the best rank-r approximation of X (Ŵ − W_start)ᵀ, which such a ΔW reaches.
    """
    rows, targets, first = (tensor.double().numpy() for tensor in (x, y, start))
    solution = np.linalg.lstsq(rows, targets, rcond=None)[0]  # (inputs, outputs)
    rest = float(np.sum((targets - rows @ solution) ** 2))
    missing = np.linalg.svd(rows @ (solution - first.T), compute_uv=False)[rank:]
    return rest / targets.size, (rest + float(np.sum(missing**2))) / targets.size


def measured_tutorial(result: TutorialResult, settings: TutorialSettings) -> Measured:
    """Return the result in words, a table and numbers. The words follow the numbers, whatever they are."""
    gap = result.difference("lora", "relora")
    ends = "ends" if gap.mean > 0 and gap.differs_from_zero() else "does not end"
    finals = {arm: result.final(arm).tolist() for arm in ARMS}
    less = {arm: signed_estimate_text(result.difference(arm, "full")) for arm in ARMS}
    rows = [(name, estimate_text(estimate(finals[arm])), less[arm]) for arm, name in ARMS.items()]
    best, bound = result.best.tolist(), result.best_low_rank.tolist()
    rows.append(("best possible", estimate_text(estimate(best)), ""))
    rows.append((f"best with rank {settings.rank}", estimate_text(estimate(bound)), ""))
    note = "Mean squared error on the training data, mean ± standard error over seeds; differences are paired by seed."
    return Measured(
        headline=f"ReLoRA {ends} below LoRA by more than two standard errors. Its loss less that of full rank is "
        f"{less['relora']}, of a least possible {result.best.mean():.2g}.",
        facts=f"{settings.samples} x {settings.inputs} → {settings.outputs}, rank {settings.rank} · {settings.steps} "
        f"steps, merged every {settings.cycle_length} · {gap.count} seeds",
        tables=(MeasuredTable(title="Losses", header=("arm", "final", "less full rank"), rows=tuple(rows), note=note),),
        captions={
            "losses.png": ("Losses", "Strong: geometric mean. Dotted: least loss of any weight, of this rank's.")
        },
        numbers={"final_loss": finals, "best_loss": best, "best_loss_of_low_rank": bound},
    )


def losses_figure(result: TutorialResult, settings: TutorialSettings) -> bytes:
    """Draw the losses by step; dotted the least losses, dashed the merges."""
    figure, ((axes,),) = new_figure(4.0)
    for losses, name, colour in zip(result.losses.values(), ARMS.values(), SERIES, strict=True):
        axes.plot(losses.T, color=colour, linewidth=0.5, alpha=0.25)
        axes.plot(np.exp(np.log(losses).mean(axis=0)), color=colour, linewidth=2.0, label=name)
    for floor in (result.best, result.best_low_rank):
        axes.axhline(np.exp(np.log(floor).mean()), color=MUTED, linestyle=":", linewidth=1.2)
    for merge in range(settings.cycle_length, settings.steps + 1, settings.cycle_length):
        axes.axvline(merge, color=ACCENT, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
    log_scale(axes.yaxis, axes)
    axes.set(xlabel="step; dashed: merges of ReLoRA", ylabel="mean squared error", xlim=(0, settings.steps * 1.01))
    legend(axes)
    return to_png(figure, dpi=160)
