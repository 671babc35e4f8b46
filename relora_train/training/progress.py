"""A stage's own account of itself: how long its parts took, and whether every layer learns or the run diverged."""

import logging
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from relora_train.distributed import Ranks, full_tensor, local_shard
from relora_train.errors import DivergedError, UntrainedLayerError
from relora_train.method.experts import low_rank_layers
from relora_train.method.layer import lora_parameters
from relora_train.method.reset import moments_of
from relora_train.training.step import StageTraining
from relora_train.training.torch_settings import device_name

CHECKED_UPDATE = 10
"""The update after which every layer is to have learned: a stage's first has no rate, and a head of zeros passes no
gradient on at once."""

_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_LOGGER = logging.getLogger(__name__)


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


def attempt_record(ranks: Ranks, step: int) -> dict[str, Any]:
    """Return the record of an attempt at a stage: when, where and from which step; reports read it."""
    return {
        "kind": "attempt",
        "step": step,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(ranks.device),
        "ranks": ranks.world_size,
    }


def low_rank_gradient_norms(training: StageTraining) -> dict[str, float]:
    """Return norms over all layers, after clipping; both zero would mean a dead low-rank update."""
    squares = {"lora_A": 0.0, "lora_B": 0.0}
    for name, parameter in lora_parameters(training.model):
        if parameter.grad is not None:
            squares[name.rpartition(".")[2]] += float(full_tensor(parameter.grad.double().square().sum()))
    return {f"{factor}_grad_norm": math.sqrt(square) for factor, square in squares.items()}


def check_learning(training: StageTraining, step: int) -> None:
    """Raise UntrainedLayerError if a layer's B has had no gradient up to its stage's tenth update.

    Called after every update, acts once: after the tenth, the last of a shorter stage, or the first after a snapshot
    beyond it. Adam's first moment is zero only as long as every gradient was, so it also tells of updates before a
    snapshot and of earlier cycles. An expert that no token has reached yet, beside others that learn, is a warning.
    """
    stage = training.stage
    if not stage.low_rank or training.checked_learning or step < min(stage.start_step + CHECKED_UPDATE, stage.end_step):
        return
    training.checked_learning = True
    layers = low_rank_layers(training.model)
    optimizer, none = training.optimizer, torch.zeros((), dtype=torch.bool, device=training.ranks.device)
    moved = torch.stack([
        local_shard(moments_of(optimizer, layer.lora_B)[0]).any() if optimizer.state.get(layer.lora_B) else none
        for layer in layers.values()
    ]).float()  # fmt: skip
    learned = training.ranks.sum(moved).tolist()  # the one time that the host waits for the device
    idle = [name for name, moved in zip(layers, learned, strict=True) if not moved]
    dead, unreached = split_idle(layers, idle)
    if unreached and training.ranks.is_first:
        _LOGGER.warning(
            "No token of the first %d updates of %s reached %s: these experts have not learned yet.",
            step - stage.start_step, stage.name, listed(unreached),
        )  # fmt: skip
    if dead:
        raise UntrainedLayerError(
            f"{listed(dead)} learned nothing in the first {step - stage.start_step} updates of stage {stage.name}: no "
            "gradient reached its low-rank update, so the model does not use the layer, or reads its weight past it. "
            "Nothing of this stage was committed. Leave it out of relora.target_modules, under a new run id."
        )


def split_idle(layers: Iterable[str], idle: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return, of the idle layers, those that are dead and the experts that no token reached, beside others that learn.

    Both in the order of `idle`.
    """
    kinds = {_EXPERT.sub("*", name) for name in {*layers} - {*idle}}
    unreached = [name for name in idle if _EXPERT.search(name) and _EXPERT.sub("*", name) in kinds]
    return [name for name in idle if name not in unreached], unreached


def listed(names: Sequence[str]) -> str:
    """Return the first five names, and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more layers" if len(names) > 5 else "")


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
