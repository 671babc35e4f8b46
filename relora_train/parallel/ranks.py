"""The processes that train one model together, as torch's launcher started them; one process is the simple case."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from relora_train.errors import TrainerCrashedError
from relora_train.parallel.devices import check_devices, usable_gpus
from relora_train.settings.running import LaunchConfig


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    sharded: bool = False
    """Whether each holds its rows of the model only. Then all must do the same forward passes, at the same time."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and events."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add every parameter's gradient over all ranks, in one message a dtype; once per update.

        Those of a sharded model are sums already, made by the backward pass.
        """
        if self.world_size == 1 or self.sharded:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, summed in zip(gradients, pieces, strict=True):
                gradient.copy_(summed.view_as(gradient))

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank; the same answer on all."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag))).item())  # between the CPUs: no GPU is waited for

    def share_text(self, text: str | None = None) -> str:
        """The first rank's text, on all; it alone gives one."""
        data = torch.tensor(list((text or "").encode()), dtype=torch.uint8, device=self.device)
        size = self.sum(torch.tensor(len(data) if self.is_first else 0, device=self.device))
        buffer = data if self.is_first else torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.world_size > 1:
            dist.broadcast(buffer, src=0)
        return bytes(buffer.cpu().tolist()).decode()

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier()


def _tells_of_a_lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


@contextmanager
def joined_ranks(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Ranks]:
    """Join the group that the launcher's environment names; leave it at the end.

    Raises DeviceError for GPUs that are asked for and not there, and TrainerCrashedError, which may be retried, in
    place of the errors that tell of another rank's death.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    check_devices(LaunchConfig(device=device, nproc_per_node=local_ranks))
    on_gpu = device != "cpu" and usable_gpus() > 0
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield Ranks(rank=rank, world_size=world_size, device=chosen)
    except RuntimeError as error:
        if not _tells_of_a_lost_rank(error):
            raise
        raise TrainerCrashedError(
            f"Rank {rank} of {world_size} lost another one ({str(error).splitlines()[0]}). Nothing of the stage was "
            "committed; the same command goes on from its newest snapshot, also with another number of ranks. A rank "
            "that is killed without a word was often killed for memory: see batch.micro_sequences."
        ) from error
    finally:
        if world_size > 1:
            dist.destroy_process_group()
