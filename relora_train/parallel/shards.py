"""Tensors of which each rank may hold only its rows; a plain tensor counts as one that this rank holds whole.

On plain tensors every function here returns what it was given, or does what torch alone would do, bit for bit.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank. Of a sharded tensor that is a new one, and all ranks must ask at the same time."""
    if isinstance(tensor, DTensor):
        full: Tensor = cast(DTensor, tensor.detach()).full_tensor()
        return full
    return tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it, in the same memory. Without gradients."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def own_rows(like: Tensor) -> slice:
    """The rows that this rank holds of a tensor."""
    if not isinstance(like, DTensor):
        return slice(0, like.shape[0] if like.ndim else None)
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return slice(offset[0], offset[0] + shape[0])


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """The rows of `full` that this rank holds of `like`."""
    return full[own_rows(like)] if isinstance(like, DTensor) else full


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which every rank holds a part, by the same rows as of `like` and on its device."""
    if not isinstance(like, DTensor):
        return part
    on_device = part.to(like.device)
    full: Tensor = DTensor.from_local(
        on_device, like.device_mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
    return full


@torch.no_grad()
def placed_like(full: Tensor, like: Tensor) -> Tensor:
    """A copy of `full` on the device, in the dtype and over the ranks of `like`."""
    copy = torch.empty_like(like.detach(), requires_grad=False)
    local(copy).copy_(part_of(full, like))
    return copy


def norm(part: Tensor, like: Tensor) -> float:
    """Frobenius norm of the whole tensor of which `part` holds this rank's rows of `like`."""
    own = torch.linalg.vector_norm(part)
    if not isinstance(like, DTensor):
        return float(own)
    square = own.to(like.device, torch.float64).square()
    torch.distributed.all_reduce(square, group=like.device_mesh.get_group())
    return float(square.sqrt())
