"""ReLoRA in one screen: a regression y = x Wᵀ + noise whose update has a higher rank than the low-rank factors.

Three arms from the same start on the same data: full rank, LoRA (one update of rank 4), ReLoRA (the same, merged every
50 of 300 steps). W is 5 × 10 and drawn independently of the start, so the best update has rank 5 and LoRA must leave
its smallest direction out, while the merged updates of ReLoRA add up. The least loss with and without that bound is
known in closed form. Everything is done with this library's own functions. Runs on the CPU in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from relora_train.errors import ConfigError
from relora_train.experiments.measured import TutorialSettings
from relora_train.method.optimizer import build_optimizer, reset_optimizer_state
from relora_train.method.relora import apply_relora, lora_parameters, merge_and_reinit
from relora_train.method.schedule import cosine, is_merge_step, jagged_cosine

Arm = Literal["full", "relora", "lora"]
ARMS: tuple[Arm, ...] = get_args(Arm)


@dataclass(frozen=True, eq=False)
class TutorialResult:
    """Losses of every arm and seed."""

    settings: TutorialSettings
    seeds: tuple[int, ...]
    losses: dict[Arm, NDArray[np.float64]]
    """(seeds, steps + 1) each: mean squared error on the training data before the first and after each update."""
    best: NDArray[np.float64]
    """(seeds,): the least-squares loss, which no weight can beat."""
    best_low_rank: NDArray[np.float64]
    """(seeds,): the smallest loss that any start + update of the settings' rank reaches."""

    def excess(self, arm: Arm) -> NDArray[np.float64]:
        """(seeds,): by how much the loss after the last update is above the best; float32 rounding is about 1e-9."""
        above: NDArray[np.float64] = self.final(arm) - self.best
        return above

    def final(self, arm: Arm) -> NDArray[np.float64]:
        """(seeds,): the loss after the last update."""
        last: NDArray[np.float64] = self.losses[arm][:, -1]
        return last


def run_tutorial(seeds: int | Sequence[int] = 10, settings: TutorialSettings | None = None) -> TutorialResult:
    """Train the three arms for each seed (a number of seeds counts from 0); a function of its arguments alone.

    ConfigError for fewer than two seeds: one has no standard error.
    """
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(chosen) < 2:
        raise ConfigError(f"{len(chosen)} seeds have no standard error. Use two or more, such as --seeds 10.")
    settings = settings or TutorialSettings()
    problems = [_Problem.draw(settings, seed) for seed in chosen]
    with _one_thread():
        losses: dict[Arm, NDArray[np.float64]] = {
            arm: np.array([_train(arm, problem, settings) for problem in problems]) for arm in ARMS
        }
    floors = np.array([_floors(problem, settings.rank) for problem in problems])
    return TutorialResult(settings, chosen, losses, best=floors[:, 0], best_low_rank=floors[:, 1])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from more, and on a busy machine threads that wait for each other lose all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class _Problem:
    seed: int
    x: Tensor
    """(samples, inputs)"""
    y: Tensor
    """(samples, outputs)"""
    start: Tensor
    """(outputs, inputs)"""

    @classmethod
    def draw(cls, settings: TutorialSettings, seed: int) -> _Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        x, weight = normal(settings.samples, settings.inputs), normal(settings.outputs, settings.inputs)
        y = x @ weight.T + settings.noise * normal(settings.samples, settings.outputs)
        start = normal(settings.outputs, settings.inputs) / math.sqrt(settings.inputs)
        return cls(seed, x, y, start)


class _Regression(nn.Module):
    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(start.shape[1], start.shape[0], bias=False)
        self.linear.weight = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        predicted: Tensor = self.linear(x)
        return predicted


def _train(arm: Arm, problem: _Problem, settings: TutorialSettings) -> list[float]:
    """The losses of one arm. What a training of a language model does at the end of a cycle, without the pipeline."""
    model = _Regression(problem.start)
    if arm != "full":
        apply_relora(
            model, rank=settings.rank, alpha=settings.alpha, dropout=0.0, target_modules=["linear"], seed=problem.seed
        )
    optimizer = build_optimizer(
        model, learning_rate=settings.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    losses = []
    for step in range(1, settings.steps + 1):
        loss = nn.functional.mse_loss(model(problem.x), problem.y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(arm, step - 1, settings)
        optimizer.step()
        if arm == "relora" and is_merge_step(step, warm_start_steps=0, cycle_length=settings.cycle_length):
            cycle = step // settings.cycle_length
            merge_and_reinit(model, cycle=cycle, seed=problem.seed)
            reset_optimizer_state(
                optimizer, lora_parameters(model), mode="magnitude", ratio=settings.reset_ratio, cycle=cycle
            )
    with torch.no_grad():
        return [*losses, nn.functional.mse_loss(model(problem.x), problem.y).item()]


def _rate(arm: Arm, step: int, settings: TutorialSettings) -> float:
    common: dict[str, Any] = {
        "total_steps": settings.steps, "warmup_steps": settings.warmup_steps, "min_lr_ratio": settings.min_lr_ratio
    }  # fmt: skip
    if arm != "relora":
        return cosine(step, **common)
    return jagged_cosine(
        step, restart_warmup_steps=settings.restart_warmup_steps, cycle_length=settings.cycle_length, **common
    )


def _floors(problem: _Problem, rank: int) -> tuple[float, float]:
    """The least-squares loss, and the smallest with an update of this rank: Eckart and Young for the metric of x.

    ‖X (Ŵ − W_start − ΔW)ᵀ‖ is least for the best rank-r approximation of X (Ŵ − W_start)ᵀ, which such a ΔW reaches.
    """
    x, y, start = (tensor.double().numpy() for tensor in (problem.x, problem.y, problem.start))
    solution = np.linalg.lstsq(x, y, rcond=None)[0]  # (inputs, outputs)
    rest = float(np.sum((y - x @ solution) ** 2))
    missing = np.linalg.svd(x @ (solution - start.T), compute_uv=False)[rank:]
    return rest / y.size, (rest + float(np.sum(missing**2))) / y.size
