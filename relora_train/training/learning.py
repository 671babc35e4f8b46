"""Does every low-rank layer learn? One that does not is found after a few updates, before hours are spent on it."""

from __future__ import annotations

import logging
import re

import torch

from relora_train.distributed import local_shard
from relora_train.errors import UntrainedLayerError
from relora_train.method.layer import relora_layers
from relora_train.training.step import StageTraining

_LOGGER = logging.getLogger(__name__)

CHECKED_UPDATE = 10
"""The update that is checked. A stage's first has no rate, and a head of zeros passes no gradient on at once."""

_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


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
    layers = dict(relora_layers(training.model))
    states = [training.optimizer.state.get(layer.lora_B, {}).get("exp_avg") for layer in layers.values()]
    none = torch.zeros((), dtype=torch.bool, device=training.ranks.device)
    moved = torch.stack([none if state is None else local_shard(state).any() for state in states]).float()
    learned = training.ranks.sum(moved).tolist()  # the one time that the host waits for the device
    idle = [name for name, moved in zip(layers, learned, strict=True) if not moved]
    kinds = {_EXPERT.sub("*", name) for name in layers if name not in idle}
    unreached = [name for name in idle if _EXPERT.search(name) and _EXPERT.sub("*", name) in kinds]
    if unreached and training.ranks.is_first:
        _LOGGER.warning(
            "No token of the first %d updates of %s reached %s: these experts have not learned yet.",
            step - stage.start_step, stage.name, _listed(unreached),
        )  # fmt: skip
    if dead := [name for name in idle if name not in unreached]:
        raise UntrainedLayerError(
            f"{_listed(dead)} learned nothing in the first {step - stage.start_step} updates of stage {stage.name}: no "
            "gradient reached its low-rank update, so the model does not use the layer, or reads its weight past it. "
            "Nothing of this stage was committed. Leave it out of relora.target_modules, under a new run id."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more layers" if len(names) > 5 else "")
