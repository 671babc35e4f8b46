"""The processes that train one model together, and tensors of which each may hold only its rows.

torch's launcher starts them; one process is the simple case. A plain tensor counts as one that this process holds
whole: on it every function here returns what it was given, or does what torch alone would do, bit for bit.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from relora_train.devices import check_devices, usable_gpus, warn_of_unused_gpu
from relora_train.errors import DeviceError, ReLoRAError, TrainerCrashedError
from relora_train.process import SHARED_MEMORY, is_out_of_memory
from relora_train.settings.running import LaunchConfig


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    sharded: bool = False
    """True if each holds its rows of the model only. Then all must do the same forward passes, at the same time."""

    @property
    def is_first(self) -> bool:
        """True for the process that writes files and events."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return True, on all ranks, if the flag is set on at least one."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag))).item())  # between the CPUs: no GPU is waited for

    def share_text(self, text: str | None = None) -> str:
        """Return the first rank's text on all; it alone gives one. Between the CPUs: waiting takes no GPU's time."""
        data = torch.tensor(list((text or "").encode()), dtype=torch.uint8)
        size = self.sum(torch.tensor(len(data) if self.is_first else 0))
        buffer = data if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        if self.world_size > 1:
            dist.broadcast(buffer, src=0)
        return bytes(buffer.tolist()).decode()

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier()

    def expect_answers_within(self, limit: timedelta) -> None:
        """From now on, take a rank that has not answered for so long as lost."""
        if self.world_size > 1:
            dist.distributed_c10d._set_pg_timeout(limit)


SLOW = timedelta(minutes=30)
"""The time that other ranks may take to load, compile, evaluate, merge or write."""

STEP = timedelta(minutes=5)
"""The time that they may take for an update once each has done one: compiled, tuned, its data at hand."""


def _as_ours(error: RuntimeError, rank: int, world_size: int) -> ReLoRAError | None:
    """Return the error of ours that stands for one of the communication between ranks; None for any other."""
    text = str(error)
    if not (isinstance(error, dist.DistError) or "gloo/transport" in text):
        return None
    first, _, last = text.partition("Last error:")  # NCCL's, which has the cause
    reason = "; ".join(part.strip().splitlines()[0] for part in (first, last) if part.strip())
    if is_out_of_memory(error) or SHARED_MEMORY in text:
        return None  # told by the process for whatever meets them
    if "ncclInvalidUsage" in text:
        return DeviceError(
            f"NCCL refuses the GPUs of rank {rank} of {world_size} ({reason}). Each rank needs a whole GPU of its own: "
            "parts of one (MIG) cannot be joined. Set launch.nproc_per_node to the number of GPUs."
        )
    return TrainerCrashedError(
        f"Rank {rank} of {world_size} lost another one ({reason}). Nothing of the stage was committed; the same "
        "command goes on from its newest snapshot, also with another number of ranks. A rank that is killed without a "
        "word was often killed for memory: see batch.micro_sequences."
    )


@contextmanager
def process_group(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Ranks]:
    """Join the group that the launcher's environment names; leave it at a good end. Inside, it is joined already.

    After an error it is not left: that waits for ranks that may sit in a message and never come. The process is to
    tell of the error and exit.
    Raises DeviceError for GPUs that are asked for and not there. Raises TrainerCrashedError, which may be retried, in
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
    elif device == "auto" and rank == 0 and not dist.is_initialized():
        warn_of_unused_gpu()
    joins = world_size > 1 and not dist.is_initialized()
    try:
        if joins:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=SLOW)
        yield Ranks(rank=rank, world_size=world_size, device=chosen)
    except RuntimeError as error:
        if ours := _as_ours(error, rank, world_size):
            raise ours from error
        raise
    if joins:
        dist.destroy_process_group()


@cache
def second_group() -> dist.ProcessGroup:
    """Return a gloo group of all ranks beside the training's; one a process, because each holds sockets to its end."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=SLOW)
    return group


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of it, on every rank. A sharded tensor is gathered into a new one, so all ranks must ask together."""
    if isinstance(tensor, DTensor):
        full: Tensor = cast(DTensor, tensor.detach()).full_tensor()
        return full
    return tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part that this rank holds, in the same memory and without gradients."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def own_rows(like: Tensor) -> slice:
    """Return the rows that this rank holds of a tensor."""
    if not isinstance(like, DTensor):
        return slice(0, like.shape[0] if like.ndim else None)
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return slice(offset[0], offset[0] + shape[0])


def shard_of(full: Tensor, like: Tensor) -> Tensor:
    """Return the rows of `full` that this rank holds of `like`."""
    return full[own_rows(like)] if isinstance(like, DTensor) else full


def gather(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor of which every rank holds a part, by the same rows as of `like` and on its device."""
    if not isinstance(like, DTensor):
        return part
    on_device = part.to(like.device)
    full: Tensor = DTensor.from_local(
        on_device, like.device_mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
    return full


def gather_on_first(part: Tensor, like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the same to the first rank, in the CPU's memory; the others send their part and get it back.

    A thread may do so if it is the only one that uses the group, whatever the rest of the process sends meanwhile.
    """
    if not isinstance(like, DTensor):
        return part
    if dist.get_rank() > 0:
        if part.numel():
            dist.send(part, dst=0, group=group)
        return part
    full = torch.empty(like.shape, dtype=part.dtype)
    for rank, rows in enumerate(full.chunk(dist.get_world_size())):  # as Shard(0) deals them
        if rank == 0:
            rows.copy_(part)
        else:
            dist.recv(rows, src=rank, group=group)
    return full


def send_from_first(tensor: Tensor) -> None:
    """Give all ranks the first one's values, in place; all must call together."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)


@torch.no_grad()
def like_sharded(full: Tensor, like: Tensor) -> Tensor:
    """Return a copy of `full` on the device, in the dtype and over the ranks of `like`."""
    copy = torch.empty_like(like.detach(), requires_grad=False)
    local_shard(copy).copy_(shard_of(full, like))
    return copy


def norm(part: Tensor, like: Tensor) -> float:
    """Frobenius norm of the whole tensor of which `part` holds this rank's rows of `like`."""
    own = torch.linalg.vector_norm(part)
    if not isinstance(like, DTensor):
        return float(own)
    square = own.to(like.device, torch.float64).square()
    torch.distributed.all_reduce(square, group=like.device_mesh.get_group())
    return float(square.sqrt())
