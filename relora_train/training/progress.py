"""A stage's own account of itself: how long its parts took, how far it is, and that it diverged."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from relora_train.distributed import full_tensor
from relora_train.errors import DivergedError
from relora_train.method.layer import lora_parameters
from relora_train.training.step import StageTraining


class Timer:
    """Wall time of a stage, and of one of its parts after another as far as this attempt went through them."""

    def __init__(self) -> None:
        self.began = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def end(self, part: str) -> None:
        """Count the time since the last part ended as this part's."""
        now = time.monotonic()
        self.seconds[part], self._last = round(now - self._last, 4), now

    def stage_seconds(self) -> float:
        """Return the seconds since the stage began, earlier attempts included once `began` is set back by them."""
        return time.monotonic() - self.began


def described(training: StageTraining) -> dict[str, Any]:
    """Return the fields of the event stage_started."""
    stage, parameters = training.stage, list(training.model.parameters())
    return {
        "stage": stage.name,
        "kind": stage.kind,
        "start_step": stage.start_step,
        "end_step": stage.end_step,
        "pid": os.getpid(),
        "device": str(training.ranks.device),
        "ranks": training.ranks.world_size,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "products": dict(Counter(training.products.values())),
        **({"matmul": training.matmul} if training.matmul else {}),
    }


def progress_fields(training: StageTraining, step: int, record: dict[str, Any], *, eta: float) -> dict[str, Any]:
    """Return the fields of the event progress."""
    stage = training.stage
    return {
        "stage": stage.name,
        "step": step,
        "start_step": stage.start_step,
        "end_step": stage.end_step,
        "loss": record["loss"],
        "learning_rate": training.learning_rate(step),
        "tokens_per_second": record["tokens_per_second"],
        "data_wait_share": record.get("data_wait_share", 0.0),  # a snapshot may be older than the field
        "eta_seconds": eta,
    }


def low_rank_gradient_norms(training: StageTraining) -> dict[str, float]:
    """Return norms over all layers, after clipping; both zero would mean a dead low-rank update."""
    squares = {"lora_A": 0.0, "lora_B": 0.0}
    for name, parameter in lora_parameters(training.model):
        if parameter.grad is not None:
            squares[name.rpartition(".")[2]] += float(full_tensor(parameter.grad.double().square().sum()))
    return {f"{factor}_grad_norm": math.sqrt(square) for factor, square in squares.items()}


def check_loss(training: StageTraining, step: int, loss: float, metrics: Sequence[Mapping[str, Any]] = ()) -> None:
    """Refuse a loss that is not finite, or above twice that of guessing."""
    limit = 2 * training.objective.guessing_loss(training.train_data.manifest)
    if not loss <= limit:  # also true for NaN
        raise diverged(training, step, loss, "training loss", metrics)


def diverged(
    training: StageTraining, step: int, loss: float, what: str, metrics: Sequence[Mapping[str, Any]] = ()
) -> DivergedError:
    """Return the error of a loss that exploded, with what to do."""
    rate = training.learning_rate(min(step, training.stage.end_step))
    changes = [record["relative_weight_change"] for record in metrics if "relative_weight_change" in record]
    first = f"; of its first updates one changed the weights by {max(changes):.2g} of their norm" if changes else ""
    return DivergedError(
        f"The {what} is {loss:.4g} at step {step} of stage {training.stage.name} (learning rate {rate:.3g}{first}): "
        "the run diverged and nothing of this stage was committed. Lower optimizer.learning_rate, raise "
        "schedule.restart_warmup_steps or use optimizer_reset.mode = 'zero', under a new run id or from an earlier "
        "checkpoint with --resume-from; or set divergence.on_divergence = 'lower_lr' and run again."
    )
