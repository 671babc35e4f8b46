"""One optimizer update of a stage: read, forward and backward, sum, clip, rate, step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from relora_train.checkpoints.manifest import Dtype
from relora_train.data.dataset import ExampleDataset
from relora_train.distributed import Ranks, full_tensor
from relora_train.method.bfloat16_adamw import BFloat16AdamW
from relora_train.method.fast_path import HashMasks
from relora_train.method.products import Products
from relora_train.method.schedule import learning_rate
from relora_train.method.stages import Stage
from relora_train.settings.profile import Profile
from relora_train.training.early_updates import EarlyUpdates
from relora_train.training.files import MasterWeights, TrainingState
from relora_train.training.gradient_sum import GradientSum
from relora_train.training.models.base import LossFunction, Objective
from relora_train.training.precision import MatmulPrecision
from relora_train.training.requests import StageRequest
from relora_train.training.torch_settings import autocast


@dataclass
class StageTraining:
    """Everything one rank holds during a stage."""

    request: StageRequest
    stage: Stage
    ranks: Ranks
    objective: Objective
    model: nn.Module
    loss_function: LossFunction
    """The model's."""

    optimizer: torch.optim.AdamW
    train_data: ExampleDataset
    batches: Prefetcher
    """Those of train_data."""

    val_data: ExampleDataset
    start: TrainingState
    """The start of the stage: the parent's end, or the beginning."""

    masters: MasterWeights | None
    """Exact frozen weights, when the device holds rounded ones."""

    gradient_sum: GradientSum
    """Over the ranks, of the model's trained parameters."""

    masks: HashMasks | None
    """Dropout's masks, when they are hashed; None: torch's generator seeds them."""

    products: Mapping[str, Products]
    """The products of each low-rank layer, by module name; empty if all follow the reference."""

    early_updates: EarlyUpdates | None = None
    """Those of the backward pass, where optimizer.in_backward asks for them."""

    checked_learning: bool = False
    """True once this process has asked if every low-rank layer learns."""

    matmul: MatmulPrecision | None = None
    """The precision that matmul_precision 'auto' stands for."""

    source_dtype: Dtype | None = None
    """The manifest's."""

    @property
    def profile(self) -> Profile:
        return self.request.profile

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def learning_rate(self, step: int) -> float:
        """Return the rate of update `step`, counted from 1."""
        return learning_rate(self.profile, self.stage, step)

    def samples_seen(self, step: int) -> int:
        """Return the data position after update `step`."""
        return self.start.samples_seen + (step - self.start.step) * self.profile.batch.sequences

    def tokens_seen(self, step: int) -> int:
        """Return the tokens trained on after update `step`."""
        return self.start.tokens_seen + (step - self.start.step) * self.profile.batch.tokens

    def update(self, step: int) -> tuple[Tensor, Tensor]:
        """Do update `step` and return its mean loss in nats per term and the gradient norm before clipping.

        Both stay on the device, and nothing here waits for it. The update is a function of the weights, the optimizer
        state and `step` alone: batch and dropout follow from the profile's seed.
        """
        profile, ranks = self.profile, self.ranks
        rows = self.batches.batch(self.samples_seen(step - 1), last=step == self.stage.end_step)

        # Divided by the terms of the whole batch, losses and gradients of all micro-steps and ranks add up to its mean.
        # Counted and summed between the CPUs, so that no GPU is waited for: numpy() would refuse its tensor. A batch
        # without terms has loss 0.
        terms = max(1, int(ranks.sum(self.loss_function.terms(rows)).numpy()))
        # Out of pinned memory the copy runs beside what the GPU is doing.
        examples = rows.to(ranks.device, non_blocking=True)
        total = torch.zeros((), device=ranks.device)
        for group in self.optimizer.param_groups:  # a number, not a scheduler: resuming restores nothing
            group["lr"] = self.learning_rate(step)
        parts = torch.split(examples, profile.batch.micro_sequences or len(examples))
        for micro_step, part in enumerate(parts):
            # Dropout's masks follow from the place, so a snapshot holds no random state and a resumed stage has the
            # same bits. Ranks drop other entries of their sequences than one another.
            torch.manual_seed(draw_seed(profile.seed, step, micro_step, ranks.rank))
            if self.masks is not None:
                self.masks.draw()
            with autocast(profile.precision, ranks.device):
                loss = self.loss_function.loss(part) / terms
            # Ranks exchange gradients once an update, while the last backward pass goes on. Sharded ranks would keep
            # whole gradients meanwhile: those of A and B are small, those of full rank are sent each time instead.
            last = part is parts[-1]
            if ranks.sharded and self.stage.low_rank:
                cast(Any, self.model).set_requires_gradient_sync(last)
            with self.gradient_sum.during() if last else nullcontext():
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()

        if self.early_updates is not None:
            return total, self.early_updates.take_norm()

        trained = self.trainable
        # No item() and no float() from here on: on a GPU each would wait for all that was given to it.
        limit = profile.optimizer.max_grad_norm
        norm = full_tensor(nn.utils.clip_grad_norm_(trained, limit if limit is not None else float("inf")))

        if isinstance(self.optimizer, BFloat16AdamW):
            # The same on all ranks, which round the same sums: else their weights would part.
            self.optimizer.rounding_seed = draw_seed(profile.seed, step, -1, 0)
        self.optimizer.step()
        return ranks.sum(total), norm


def draw_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Return the seed of one forward pass's dropout: another for every rank and micro-step, and no state to save."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Prefetcher:
    """A reader of one rank's rows of the global batches of `sequences`, into memory that its device copies from.

    A batch's examples depend on its position alone, so reading ahead changes no bit and has no state to save.
    The dataset is read on this thread only.
    """

    def __init__(self, dataset: ExampleDataset, *, sequences: int, ranks: Ranks) -> None:
        self._dataset, self._sequences, self._ranks = dataset, sequences, ranks
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")  # ends when nobody holds it
        self._ahead: tuple[int, Future[Tensor]] | None = None
        self._seconds_waited = 0.0

    def batch(self, position: int, *, last: bool = False) -> Tensor:
        """Examples (rows, row length) of the batch at this position, on the CPU; unless `last`, begins with the next.

        Raises what reading raises.
        """
        started = time.perf_counter()
        ahead, self._ahead = self._ahead, None
        reading = ahead[1] if ahead is not None and ahead[0] == position else self._reader.submit(self._read, position)
        rows = reading.result()
        self._seconds_waited += time.perf_counter() - started
        if not last:
            following = position + self._sequences
            self._ahead = following, self._reader.submit(self._read, following)
        return rows

    def take_seconds_waited(self) -> float:
        """Return seconds that training has waited for data since this was last asked."""
        waited, self._seconds_waited = self._seconds_waited, 0.0
        return waited

    def _read(self, position: int) -> Tensor:
        ranks = self._ranks
        blocks = self._dataset.read_batch(position, self._sequences, rank=ranks.rank, world_size=ranks.world_size)
        tokens = torch.from_numpy(blocks)
        return tokens.pin_memory() if ranks.device.type == "cuda" else tokens
