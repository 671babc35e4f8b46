"""y_k = W_k x + b_k + s B_k A_k dropout(x) for layers k that share an input, as one autograd function.

Against writing the formula down, it reads x once for all the layers, adds in place, multiplies as products.py chose,
keeps neither A x nor a dropout mask (both are made again for the backward pass: the mask from a seed)
and forms a merged weight at most once an update. `relora_linear` in layer.py is the readable reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from relora_train.method.products import Products

_MASK_STEPS = 65_536  # p is met to within 1 / 131,072
_BYTE = 256


@dataclass(frozen=True)
class Factors:
    """One layer's tensors: weight (out, in), bias (out) or None, A (rank, in), B (out, rank), and the merged weight."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    merged: Tensor | None = None
    """W + s BA, without gradient; needed unless the products are split."""


def low_rank_linears(
    x: Tensor, layers: Sequence[Factors], products: Products, scaling: float, dropout: float
) -> tuple[Tensor, ...]:
    """Return the outputs of all the layers, each (..., out) for x (..., in), in the dtype that nn.Linear would give.

    The weights get no gradient. dropout: share of x's entries that the low-rank path does not see; the same for all the
    layers, drawn from torch's default CPU generator. Under autocast products are in autocast's dtype.
    """
    # .numpy() is refused for a tensor on a device: this can never come to wait for one.
    seed = int(torch.randint(2**62, (), device="cpu").numpy()) if dropout > 0 else 0
    tensors = [t for layer in layers for t in (layer.weight, layer.bias, layer.A, layer.B, layer.merged)]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layers[0].weight.dtype
    with torch.autocast(device, enabled=False):
        made = _LowRankLinears.apply(x, dtype, products, scaling, dropout, seed, *tensors)  # type: ignore[no-untyped-call]
    out_dtype = dtype if torch.is_autocast_enabled(device) else x.dtype
    return tuple(y.to(out_dtype) for y in made)


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        products: Products,
        scaling: float,
        dropout: float,
        seed: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        layers = _layers(tensors)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        outputs = []
        if products != "split":
            outputs = [F.linear(rows, _of(layer.merged), _cast(layer.bias, dtype)) for layer in layers]
        else:
            thin = _joint([layer.A for layer in layers], dtype)
            low = _read(rows, _kept(rows, dropout, seed)) @ thin.T  # (tokens, layers * rank)
            for layer, part in zip(layers, torch.split(low, [len(layer.A) for layer in layers], dim=1), strict=True):
                y = F.linear(rows, layer.weight.to(dtype), _cast(layer.bias, dtype))
                outputs.append(y.addmm_(part, layer.B.to(dtype).T, alpha=_low_rank_scale(scaling, dropout)))
        ctx.save_for_backward(x, *tensors)
        ctx.settings = dtype, products, scaling, dropout, seed
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        dtype, products, scaling, dropout, seed = ctx.settings
        layers, scale = _layers(tensors), _low_rank_scale(scaling, dropout)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        grads = [gradient.reshape(-1, gradient.shape[-1]).to(dtype) for gradient in gradients]
        ranks = [len(layer.A) for layer in layers]
        needs_x, thin = ctx.needs_input_grad[0], _joint([layer.A for layer in layers], dtype)
        through_A = None
        if products != "dense":
            through_A = rows.new_empty(len(rows), sum(ranks))  # s g B, all layers side by side
            for layer, gradient, part in zip(layers, grads, torch.split(through_A, ranks, dim=1), strict=True):
                torch.mm(gradient, layer.B.to(dtype), out=part)
            through_A *= scale
        kept = _kept(rows, dropout, seed)
        grad_x = _input_gradient(layers, grads, products, through_A, thin, kept) if needs_x else None
        if products != "dense":
            read = _read(rows, kept)
            grad_thin, low = _of(through_A).T @ read, read @ thin.T
            del read, kept
            factor_grads = [
                (grad_A, (gradient.T @ part).mul_(scale))
                for grad_A, gradient, part in zip(
                    torch.split(grad_thin, ranks), grads, torch.split(low, ranks, dim=1), strict=True
                )
            ]
        else:
            factor_grads = [
                _through_dense(layer, gradient, rows, scale) for layer, gradient in zip(layers, grads, strict=True)
            ]
        found: list[Tensor | None] = []
        for layer, gradient, (grad_A, grad_B) in zip(layers, grads, factor_grads, strict=True):
            grad_bias = None if layer.bias is None else gradient.sum(0, dtype=layer.bias.dtype)
            found += [None, grad_bias, grad_A.to(layer.A.dtype), grad_B.to(layer.B.dtype), None]
        shaped = None if grad_x is None else grad_x.to(x.dtype).view(x.shape)
        return shaped, None, None, None, None, None, *found


def _input_gradient(
    layers: Sequence[Factors],
    grads: Sequence[Tensor],
    products: Products,
    through_A: Tensor | None,
    thin: Tensor,
    kept: Tensor | None,
) -> Tensor:
    """Return the gradient of x, summed over the layers as it is made."""
    total: Tensor | None = None
    for layer, gradient in zip(layers, grads, strict=True):
        weight = layer.weight.to(gradient.dtype) if products == "split" else _of(layer.merged)
        total = gradient @ weight if total is None else total.addmm_(gradient, weight)
    if products != "split":
        return _of(total)
    if kept is None:
        return _of(total).addmm_(_of(through_A), thin)
    return _of(total).addcmul_(_of(through_A) @ thin, kept)


def _through_dense(layer: Factors, gradient: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dense = (gradient.T @ rows).mul_(scale)
    return layer.B.to(dense.dtype).T @ dense, dense @ layer.A.to(dense.dtype).T


def _read(rows: Tensor, kept: Tensor | None) -> Tensor:
    """Return the low-rank path's input, not rescaled: the scale is in its product. The mask's memory becomes it."""
    return rows if kept is None else kept.mul_(rows)


def _kept(rows: Tensor, dropout: float, seed: int) -> Tensor | None:
    """Return a mask for the rows, in their dtype: 1 where an entry is kept, else 0; None: all are.

    A function of shape, seed and kind of device, not of the dtype. Entries are kept independently of one another, given
    their row's threshold.
    """
    if dropout == 0:
        return None
    drop = _dropped_steps(dropout)
    if rows.device.type != "cpu":
        generator = torch.Generator(rows.device).manual_seed(seed)
        return torch.empty_like(rows).bernoulli_(1 - drop / _MASK_STEPS, generator=generator)
    kept = torch.empty_like(rows)  # written as numbers at once: a bool mask takes longer to make and to multiply by
    if drop < _MASK_STEPS // 32:
        values = torch.from_numpy(_random_words(seed, 2 * rows.numel()).view(np.int16))
        return torch.ge(values[: rows.numel()].view(rows.shape), drop - _MASK_STEPS // 2, out=kept)
    # 8 bits an entry. Whether a row drops the bytes below `low`, or `low` itself too, is drawn for each row, so that in
    # the mean the share is p and not a multiple of 1 / 256.
    values = torch.from_numpy(_random_words(seed, rows.numel() + len(rows)).view(np.uint8))
    low, rest = divmod(drop, _BYTE)
    first_kept = (values[-len(rows) :] < rest).to(torch.uint8).add_(low)  # (rows)
    return torch.ge(values[: rows.numel()].view(rows.shape), first_kept[:, None], out=kept)


def _random_words(seed: int, size_bytes: int) -> npt.NDArray[np.uint64]:
    """Many times faster than torch's generator, which also draws 32 bits for each entry of a mask."""
    return np.random.SFC64(seed).random_raw(-(-size_bytes // 8))


def _dropped_steps(dropout: float) -> int:
    """Return the share that a mask drops, in units of 1 / 65,536; above 255 / 256 it is that."""
    return min(round(dropout * _MASK_STEPS), _MASK_STEPS - _BYTE)


def _low_rank_scale(scaling: float, dropout: float) -> float:
    """s / (1 - p), with the p that the mask really has."""
    return scaling / (1 - _dropped_steps(dropout) / _MASK_STEPS)


def _layers(tensors: Sequence[Tensor | None]) -> list[Factors]:
    return [Factors(*tensors[i : i + 5]) for i in range(0, len(tensors), 5)]  # type: ignore[arg-type]


def _joint(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return factors[0].to(dtype) if len(factors) == 1 else torch.cat([factor.to(dtype) for factor in factors])


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _of(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TypeError("the chosen products need a tensor that was not given")
    return tensor
