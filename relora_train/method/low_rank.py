"""y_k = W_k x + b_k + s B_k A_k dropout(x) for layers k that share an input, as one autograd function.

It reads x once for all the layers, adds in place, and multiplies as products.py chose. It keeps neither A x nor a
dropout mask: the backward pass makes both again, the mask from a seed. `relora_linear` in layer.py is the readable
reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from relora_train.method.frozen import dequantize
from relora_train.method.graph_path import MASK_STEPS, dropped_steps, hash_mask, low_rank_scale
from relora_train.method.products import Products

_BYTE = 256


@dataclass(frozen=True)
class Factors:
    """One layer's tensors: weight (out, in), bias (out) or None, A (rank, in), B (out, rank)."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    merged: Tensor | None = None
    """W + s BA, without gradient; needed unless the products are split."""

    scales: Tensor | None = None
    """Those of a weight that is held as codes (frozen.py), which is made anew for each product."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which nn.Linear would multiply."""
        return self.weight.dtype if self.scales is None else self.A.dtype

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        return dequantize(self.weight, self.scales, (len(self.B), self.A.shape[1]), dtype)


def low_rank_linears(
    x: Tensor,
    layers: Sequence[Factors],
    products: Products,
    scaling: float,
    dropout: float,
    mask_seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the outputs of all the layers, each (..., out) for x (..., in), in the dtype that nn.Linear would give.

    The weights get no gradient. dropout: share of x's entries that the low-rank path does not see; the same for all the
    layers, by the hash of mask_seed, or drawn from torch's default CPU generator. Under autocast products are in
    autocast's dtype.
    """
    # .numpy() is refused for a tensor on a device: this can never come to wait for one.
    seed: int | Tensor = 0
    if dropout > 0:
        seed = int(torch.randint(2**62, (), device="cpu").numpy()) if mask_seed is None else mask_seed
    tensors = [getattr(layer, field.name) for layer in layers for field in fields(Factors)]
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else layers[0].dtype
    with torch.autocast(device, enabled=False):
        made = _LowRankLinears.apply(x, dtype, products, scaling, dropout, seed, *tensors)  # type: ignore[no-untyped-call]
    # Views are made out here: Falcon writes into one, which torch allows for no view that a function returns.
    return tuple(y.view(*x.shape[:-1], -1).to(dtype if autocast else x.dtype) for y in made)


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        products: Products,
        scaling: float,
        dropout: float,
        seed: int | Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        layers = _layers(tensors)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        outputs = []
        if products != "split":
            outputs = [F.linear(rows, _of(layer.merged), _cast(layer.bias, dtype)) for layer in layers]
        else:
            # All A in one product: its short side r costs as much as r + 16 on a CPU, r + 360 on an H100 (products.py).
            low = _read(rows, _kept(rows, dropout, seed)) @ _stacked(layers, dtype).T  # (tokens, layers * rank)
            for layer, part in zip(layers, torch.split(low, [len(layer.A) for layer in layers], dim=1), strict=True):
                y = F.linear(rows, layer.whole(dtype), _cast(layer.bias, dtype))
                outputs.append(y.addmm_(part, layer.B.to(dtype).T, alpha=low_rank_scale(scaling, dropout)))
        ctx.save_for_backward(rows, *tensors)  # not x: under autocast that is twice as large
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.settings = dtype, products, scaling, dropout, seed
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, *tensors = ctx.saved_tensors
        dtype, products, scaling, dropout, seed = ctx.settings
        layers, scale = _layers(tensors), low_rank_scale(scaling, dropout)
        grads = [gradient.to(dtype) for gradient in gradients]
        ranks = [len(layer.A) for layer in layers]
        thin = _stacked(layers, dtype)
        through_A = rows.new_empty(
            len(rows), 0 if products == "dense" else sum(ranks)
        )  # s g B, all layers side by side
        if products != "dense":
            for layer, gradient, part in zip(layers, grads, torch.split(through_A, ranks, dim=1), strict=True):
                torch.mm(gradient, layer.B.to(dtype), out=part)
            through_A *= scale
        kept = _kept(rows, dropout, seed)
        grad_x: Tensor | None = None  # summed over the layers as it is made
        if ctx.needs_input_grad[0]:
            for layer, gradient in zip(layers, grads, strict=True):
                weight = layer.whole(dtype) if products == "split" else _of(layer.merged)
                grad_x = gradient @ weight if grad_x is None else grad_x.addmm_(gradient, weight)
            if products == "split" and kept is None:
                grad_x = _of(grad_x).addmm_(through_A, thin)
            elif products == "split":
                grad_x = _of(grad_x).addcmul_(through_A @ thin, _of(kept))
            grad_x = _of(grad_x).to(ctx.x_dtype).view(ctx.x_shape)
        factor_grads = []
        if products == "dense":
            for layer, gradient in zip(layers, grads, strict=True):
                dense = (gradient.T @ rows).mul_(scale)  # of the merged weight, (out, in)
                factor_grads.append((layer.B.to(dtype).T @ dense, dense @ layer.A.to(dtype).T))
        else:
            read = _read(rows, kept)
            grad_thin, low = through_A.T @ read, read @ thin.T
            del read, kept  # as large as x: freed before the products below are made
            parts = zip(torch.split(grad_thin, ranks), grads, torch.split(low, ranks, dim=1), strict=True)
            factor_grads = [(grad_A, (gradient.T @ part).mul_(scale)) for grad_A, gradient, part in parts]
        found: list[Tensor | None] = []
        for layer, gradient, (grad_A, grad_B) in zip(layers, grads, factor_grads, strict=True):
            grad_bias = None if layer.bias is None else gradient.sum(0, dtype=layer.bias.dtype)
            found += [None, grad_bias, grad_A.to(layer.A.dtype), grad_B.to(layer.B.dtype), None, None]
        return grad_x, None, None, None, None, None, *found


def _read(rows: Tensor, kept: Tensor | None) -> Tensor:
    """Return the low-rank path's input, not rescaled: the scale is in its product. The mask's memory becomes it."""
    return rows if kept is None else kept.mul_(rows)


def _kept(rows: Tensor, dropout: float, seed: int | Tensor) -> Tensor | None:
    """Return a mask for the rows, in their dtype: 1 where an entry is kept, else 0; None: all are.

    A function of shape, seed and kind of device, not of the dtype. Entries are kept independently of one another, given
    their row's threshold.
    """
    if dropout == 0:
        return None
    if isinstance(seed, Tensor):
        return hash_mask(rows, seed, dropout).to(rows.dtype)
    drop = dropped_steps(dropout)
    if rows.device.type != "cpu":
        generator = torch.Generator(rows.device).manual_seed(seed)
        return torch.empty_like(rows).bernoulli_(1 - drop / MASK_STEPS, generator=generator)
    kept = torch.empty_like(rows)  # written as numbers at once: a bool mask takes longer to make and to multiply by
    if drop < MASK_STEPS // 32:
        values = torch.from_numpy(_random_words(seed, 2 * rows.numel()).view(np.int16))
        return torch.ge(values[: rows.numel()].view(rows.shape), drop - MASK_STEPS // 2, out=kept)
    # 8 bits an entry. Whether a row drops the bytes below `low`, or `low` itself too, is drawn for each row, so that in
    # the mean the share is p and not a multiple of 1 / 256.
    values = torch.from_numpy(_random_words(seed, rows.numel() + len(rows)).view(np.uint8))
    low, rest = divmod(drop, _BYTE)
    first_kept = (values[-len(rows) :] < rest).to(torch.uint8).add_(low)  # (rows)
    return torch.ge(values[: rows.numel()].view(rows.shape), first_kept[:, None], out=kept)


def _random_words(seed: int, size_bytes: int) -> npt.NDArray[np.uint64]:
    """Many times faster than torch's generator, which also draws 32 bits for each entry of a mask."""
    return np.random.SFC64(seed).random_raw(-(-size_bytes // 8))


def _layers(tensors: Sequence[Tensor | None]) -> list[Factors]:
    size = len(fields(Factors))
    return [Factors(*tensors[i : i + size]) for i in range(0, len(tensors), size)]  # type: ignore[arg-type]


def _stacked(layers: Sequence[Factors], dtype: torch.dtype) -> Tensor:
    return layers[0].A.to(dtype) if len(layers) == 1 else torch.cat([layer.A.to(dtype) for layer in layers])


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _of(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TypeError("the chosen products need a tensor that was not given")
    return tensor
