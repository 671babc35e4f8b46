"""A frozen weight in few bytes: int8 with a scale a row, or nf4, four bits with a scale for each 64 weights.

Only what a device holds is rounded. The exact weight is the master that merges add to (merge.py), so nothing builds up
over cycles. Sources: int8 by row and absmax; nf4: arXiv 2305.14314, its table and the layout of bitsandbytes.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Frozen = Literal["float32", "bfloat16", "int8", "nf4"]

QUANTIZED: tuple[Frozen, ...] = ("int8", "nf4")

NF4_BLOCK = 64
"""Weights that share a scale, counted through the matrix as it lies in memory."""

KINDS: dict[torch.dtype, Frozen] = {torch.int8: "int8", torch.uint8: "nf4"}
"""The kind of codes by their dtype; tensors of other dtypes are weights themselves."""

_INT8_LIMIT = 127
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero."""


def quantize(weight: Tensor, kind: Frozen) -> tuple[Tensor, Tensor | None]:
    """Return codes and float32 scales of a weight (out, in); without scales the codes are the weight in that dtype.

    int8: codes (out, in), scales (out, 1). nf4: codes of two weights a byte, the first in the high bits, as one uint8
    vector, scales (blocks, 1).
    """
    if kind == "int8":
        scales = weight.float().abs().amax(1, keepdim=True).div_(_INT8_LIMIT)
        scales[scales == 0] = 1  # a row of zeros
        return weight.float().div(scales).round_().to(torch.int8), scales
    if kind == "nf4":
        entries = weight.float().reshape(-1)
        blocks = -(-len(entries) // NF4_BLOCK)
        padded = torch.nn.functional.pad(entries, (0, blocks * NF4_BLOCK - len(entries))).view(blocks, NF4_BLOCK)
        scales = padded.abs().amax(1, keepdim=True)
        table = padded.new_tensor(_NF4)
        halfway = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(padded / scales.masked_fill(scales == 0, 1), halfway).to(torch.uint8)
        first, second = codes.view(-1)[: len(entries) + len(entries) % 2].view(-1, 2).unbind(1)
        return first << 4 | second, scales
    return weight.to(getattr(torch, kind)), None


def dequantize(codes: Tensor, scales: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) that quantize's codes and scales stand for, in this dtype."""
    if scales is None:
        return codes.to(dtype)
    if codes.dtype == torch.int8:
        return codes.to(dtype) * scales.to(dtype)
    if codes.is_cuda and _has_bitsandbytes():  # one kernel; the table's look-ups take four
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            codes[:, None], scales.view(-1), NF4_BLOCK, "nf4", list(shape), dtype
        )
        return found
    pairs = torch.stack([codes >> 4, codes & 15], 1).view(-1).int()
    entries = torch.tensor(_NF4, dtype=dtype, device=codes.device)[pairs]
    size = shape[0] * shape[1]
    padded = torch.nn.functional.pad(entries, (0, scales.numel() * NF4_BLOCK - len(entries)))
    return (padded.view(-1, NF4_BLOCK) * scales.to(dtype)).view(-1)[:size].view(shape)


@cache
def _has_bitsandbytes() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes  # noqa: F401 (registers the operation)

    return True
