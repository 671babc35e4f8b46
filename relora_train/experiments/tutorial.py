"""ReLoRA in one screen: a regression y = x Wᵀ + noise whose best update has a higher rank than the low-rank factors.

Three arms start alike on the same data: full rank, LoRA (one update of rank 4), ReLoRA (the same, merged every 50 of
300 steps). W is 5 × 10 and drawn independently of the start, so the best update has rank 5. LoRA must leave its
smallest direction out, while the merged updates of ReLoRA add up. Everything is done with this library's own functions.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from relora_train.errors import ConfigError
from relora_train.experiments.measured import TutorialSettings
from relora_train.method.layer import lora_parameters
from relora_train.method.merge import merge_and_reinit
from relora_train.method.reset import reset_optimizer_state
from relora_train.method.schedule import cosine, jagged_cosine
from relora_train.method.wrap import apply_relora
from relora_train.reports.statistics import Estimate, paired_difference
from relora_train.training.optimizer import build_optimizer

ARMS = {"full": "full rank", "relora": "ReLoRA", "lora": "LoRA"}
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TutorialResult:
    """Mean squared errors on the training data, by seed."""

    settings: TutorialSettings
    seeds: tuple[int, ...]
    losses: dict[str, Floats]
    """(seeds, steps + 1) by arm: before the first and after each update."""
    best: Floats
    """(seeds,): the least-squares loss, which no weight can beat."""
    best_low_rank: Floats
    """(seeds,): the smallest loss that any start + update of the settings' rank reaches."""

    def final(self, arm: str) -> Floats:
        """Return the (seeds,) losses after the last update."""
        last: Floats = self.losses[arm][:, -1]
        return last

    def difference(self, arm: str, reference: str) -> Estimate:
        """Return the first less the second, paired by seed: what a seed does to both cancels."""
        first, second = (dict(zip(self.seeds, map(float, self.final(name)), strict=True)) for name in (arm, reference))
        return cast(Estimate, paired_difference(first, second))  # never None: the seeds are the same


def run_tutorial(seeds: Sequence[int], settings: TutorialSettings | None = None) -> TutorialResult:
    """Train the three arms for each seed; a function of its arguments alone. Raises ConfigError for one seed."""
    if len(seeds) < 2:
        raise ConfigError(f"{len(seeds)} seeds have no standard error. Use two or more, such as --seeds 0,1,2.")
    settings, threads = settings or TutorialSettings(), torch.get_num_threads()
    torch.set_num_threads(1)  # products this small gain nothing from more, and threads that wait for others lose all
    try:
        problems = [draw_problem(settings, seed) for seed in seeds]
        losses = {
            arm: np.array([train(arm, *it, settings) for it in zip(problems, seeds, strict=True)]) for arm in ARMS
        }
    finally:
        torch.set_num_threads(threads)
    floors = np.array([least_losses(*problem, rank=settings.rank) for problem in problems])
    return TutorialResult(settings, tuple(seeds), losses, best=floors[:, 0], best_low_rank=floors[:, 1])


def draw_problem(settings: TutorialSettings, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (samples, inputs), y (samples, outputs) and the start of W (outputs, inputs)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(settings.samples, settings.inputs, generator=generator)
    weight = torch.randn(settings.outputs, settings.inputs, generator=generator)
    y = x @ weight.T + settings.noise * torch.randn(settings.samples, settings.outputs, generator=generator)
    return x, y, torch.randn(settings.outputs, settings.inputs, generator=generator) / math.sqrt(settings.inputs)


def train(arm: str, problem: tuple[Tensor, Tensor, Tensor], seed: int, settings: TutorialSettings) -> list[float]:
    """Return the losses of one arm: the loop of a language model's training, without the pipeline."""
    x, y, start = problem
    linear = nn.Linear(settings.inputs, settings.outputs, bias=False)
    linear.weight = nn.Parameter(start.clone())
    model = nn.Sequential(OrderedDict(linear=linear))
    if arm != "full":
        apply_relora(model, rank=settings.rank, alpha=settings.alpha, dropout=0.0, target_modules=["linear"], seed=seed)
    peak = settings.learning_rate
    optimizer = build_optimizer(model, learning_rate=peak, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    curve: dict[str, Any] = {
        "total_steps": settings.steps, "warmup_steps": settings.warmup_steps, "min_lr_ratio": settings.min_lr_ratio
    }  # fmt: skip
    losses = []
    for step in range(1, settings.steps + 1):
        loss = nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        rate = cosine(step - 1, **curve)
        if arm == "relora":
            start_of_cycle = (step - 1) // settings.cycle_length * settings.cycle_length
            climb = settings.restart_warmup_steps
            rate = jagged_cosine(step - 1, cycle_start=start_of_cycle, restart_warmup_steps=climb, **curve)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        optimizer.step()
        if arm == "relora" and step % settings.cycle_length == 0:
            cycle, factors = step // settings.cycle_length, lora_parameters(model)
            merge_and_reinit(model, cycle=cycle, seed=seed)
            reset_optimizer_state(optimizer, factors, mode="magnitude", ratio=settings.reset_ratio, cycle=cycle)
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
