"""Gradients summed over the ranks in buckets, each on its way while the backward pass still makes the next."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora_train.distributed import Ranks

_BUCKET_BYTES = 32 * 2**20
"""Large enough that a message's start does not count, small enough that the last one is soon over."""

_UNDER_WAY = 2
"""Buckets sent and not read back: more would be a second copy of all gradients."""


@dataclass
class _Bucket:
    parameters: list[nn.Parameter]
    waited_for: int = 0
    message: Tensor = field(default_factory=lambda: torch.empty(0))
    work: dist.Work | None = None


class GradientSum:
    """Sums the gradients of parameters over all ranks during one backward pass: the last of an update.

    Those of a sharded model are sums already, made by the backward pass; then this does nothing. Ranks may differ in
    the parameters that got a gradient, such as those of experts; one that got none on any rank keeps none.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self._buckets: list[_Bucket] = []
        self._active, self._next = False, 0
        if ranks.world_size == 1 or ranks.sharded:
            return
        room: dict[torch.dtype, int] = {}
        of_dtype: dict[torch.dtype, _Bucket] = {}
        for parameter in reversed(list(parameters)):  # about the order in which a backward pass makes gradients
            size = parameter.numel() * parameter.element_size()
            if room.get(parameter.dtype, 0) < size:
                of_dtype[parameter.dtype], room[parameter.dtype] = _Bucket([]), _BUCKET_BYTES
                self._buckets.append(of_dtype[parameter.dtype])
            bucket = of_dtype[parameter.dtype]
            bucket.parameters.append(parameter)
            room[parameter.dtype] -= size
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _, bucket=bucket: self._made(bucket)
            )

    @contextmanager
    def during(self) -> Iterator[None]:
        """Sum the gradients as they stand after the backward pass in this block, those of earlier ones included."""
        for bucket in self._buckets:
            bucket.waited_for = len(bucket.parameters)
        self._active, self._next = True, 0
        try:
            yield
        finally:
            self._active = False
        while self._next < len(self._buckets):
            self._send()
        for bucket in self._buckets[-_UNDER_WAY:]:
            _read_back(bucket)

    def _made(self, bucket: _Bucket) -> None:
        if not self._active:
            return
        bucket.waited_for -= 1
        # In one order on all ranks, whatever order their gradients are made in: else a sum would mix two buckets.
        while self._next < len(self._buckets) and self._buckets[self._next].waited_for == 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[self._next]
        if self._next >= _UNDER_WAY:
            _read_back(self._buckets[self._next - _UNDER_WAY])
        first = bucket.parameters[0]
        made = first.new_ones(len(bucket.parameters))  # after the sum: by how many ranks each was made
        for index, parameter in enumerate(bucket.parameters):
            if parameter.grad is None:
                made[index] = 0
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in bucket.parameters]
        bucket.message = torch.cat([*parts, made])
        bucket.work = dist.all_reduce(bucket.message, async_op=True)
        self._next += 1


@torch.no_grad()
def _read_back(bucket: _Bucket) -> None:
    if bucket.work is not None:
        bucket.work.wait()
    *sums, made = torch.split(bucket.message, [*(p.numel() for p in bucket.parameters), len(bucket.parameters)])
    for index, (parameter, total) in enumerate(zip(bucket.parameters, sums, strict=True)):
        if parameter.grad is not None:
            parameter.grad.copy_(total.view_as(parameter))
        elif made[index] > 0:  # the host waits for the device, where a gradient is missing only
            parameter.grad = total.view_as(parameter).clone()
    bucket.message, bucket.work = torch.empty(0), None
