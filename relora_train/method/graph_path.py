"""Layers in plain operations, which torch.compile makes into one graph: forward, backward, dropout mask and all.

low_rank.py is the form for eager execution. This one reads no number from a tensor, so all blocks of a model share one
graph; the compiler fuses what the eager form fuses by hand.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_STEPS = 65_536
"""Dropout's share is met to within 1 / 131,072."""


def dropped_steps(dropout: float) -> int:
    """Return the share that a mask drops, in units of 1 / 65,536; above 255 / 256 it is that."""
    return min(round(dropout * MASK_STEPS), MASK_STEPS - 256)


def low_rank_scale(scaling: float, dropout: float) -> float:
    """s / (1 - p), with the p that the mask really has."""
    return scaling / (1 - dropped_steps(dropout) / MASK_STEPS)


def hash_mask(rows: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Return a bool mask (n, d) for rows (n, d): True where 16 bits of a hash of the position reach the dropped share.

    seed: two int32 numbers on the device of rows. The mask is a function of the seed and the positions alone: eager and
    compiled code on any device make the same one. Source: the two rounds of multiply and shift of Chris Wellons'
    prospector, over position * odd + offset.
    """
    n, d = rows.shape
    row = torch.arange(n, device=rows.device, dtype=torch.int32)[:, None]
    x = (row * d + torch.arange(d, device=rows.device, dtype=torch.int32)) * (seed[1] | 1) + seed[0]
    # int32 wraps modulo 2**32 in eager torch, in C++ and in Triton: tests/test_compiled.py compares masks. ">>" carries
    # the sign down, so each shift is masked.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x21F0AAAD
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * 0x735A2D97
    x = x ^ ((x >> 15) & 0x1FFFF)
    return (x & 0xFFFF) >= dropped_steps(dropout)


def linears_in_graph(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]],
    scale: float,
    seed: Tensor | None,
    dropout: float,
) -> list[Tensor]:
    """Return W x + b + scale * B (A (mask * x)), each (..., out), for each (W, b, A, B) and x (..., in).

    The dtype is that of nn.Linear. scale: low_rank_scale's. seed: hash_mask's; not needed without dropout.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else layers[0][0].dtype
    with torch.autocast(device, enabled=False):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        read = rows if seed is None or dropout == 0 else torch.where(hash_mask(rows, seed, dropout), rows, 0.0)
        low = read @ torch.cat([A.to(dtype) for _, _, A, _ in layers]).T  # (tokens, layers * rank)
        parts = torch.split(low, [len(A) for _, _, A, _ in layers], dim=1)
        made = []
        for (weight, bias, _, B), part in zip(layers, parts, strict=True):
            bias = None if bias is None else bias.to(dtype)
            made.append(_WithLowRank.apply(rows, part, weight.to(dtype), bias, (scale * B).to(dtype)))  # type: ignore[no-untyped-call]
    return [y.view(*x.shape[:-1], -1).to(dtype if autocast else x.dtype) for y in made]


class _WithLowRank(torch.autograd.Function):
    """rows @ W.T + low @ B.T + bias as one product, [rows, low] @ [W, B].T: a second one would copy y and read it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
        ctx.save_for_backward(low, weight, B)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(torch.cat([rows, low], dim=1), torch.cat([weight, B], dim=1), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (low, weight, B) = gradients, ctx.saved_tensors
        bias = None if ctx.bias_dtype is None else gradient.sum(0, dtype=ctx.bias_dtype)
        return gradient @ weight, gradient @ B, None, bias, gradient.T @ low
