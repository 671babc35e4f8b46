"""Which of torch's float32 matmul precisions is the fastest here that keeps float32's accuracy: measured, not assumed.

"medium" is TF32 or bfloat16 on some devices and on many CPUs merely another library, of the same accuracy and faster.
So speed and error of the model's own products are measured under each, and what rounds more than float32 is refused.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

MatmulPrecision = Literal["highest", "high", "medium"]
PRECISIONS: tuple[MatmulPrecision, ...] = ("highest", "high", "medium")

_ERROR_FACTOR = 4
"""Float32 products that add up in another order differ in error by less: up to 2.2 times, MKL and oneDNN, sums of 16
to 11,000 terms. The next coarser way, three bfloat16 passes, is 40 times off, TF32 a thousand times."""

_LARGEST_ERROR = 1e-5
"""Relative error. Float32 has 1e-7 to 1e-6, three bfloat16 passes 1e-5, TF32 3e-4, bfloat16 2e-3."""

_WORTHWHILE = 1.1
"""A smaller gain is within what a busy machine's clock says, and not worth other bits."""

_ROUNDS = 4
_SECONDS = 0.5  # for a product, once it has its two rounds
_FLOPS = 2e8  # of a product that is timed: fewer rows of it tell as much
_FEWEST_ROWS = 64
_CHECKED = (32, 512)  # rows and columns of a product that are made again in float64


class Product(NamedTuple):
    """x Wᵀ, and what follows from it in the backward pass, for x (rows, in_features), W (out_features, in_features)."""

    rows: int
    in_features: int
    out_features: int


class Measured(NamedTuple):
    """Of the products: time, and the largest relative error among them, each as a norm over its entries."""

    seconds: float | None
    """None for what need not be timed: too inexact, or plainly the same as "highest"."""

    error: float


class Choice(NamedTuple):
    """What a run computes with, and why."""

    precision: MatmulPrecision
    reason: str


def products_of(model: nn.Module, *, rows: int) -> Counter[Product]:
    """The model's products with its matrices, embeddings aside, for an input of so many rows; how often each occurs."""
    return Counter(
        Product(rows, parameter.shape[1], parameter.shape[0])
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 2
    )


def measure_precisions(products: Mapping[Product, int], device: torch.device) -> dict[MatmulPrecision, Measured]:
    """Speed and error under each precision, taking turns."""
    errors = {precision: product_error(products, device, precision) for precision in PRECISIONS}
    base = errors["highest"]
    others = [p for p in PRECISIONS if errors[p] != base and is_accurate(errors[p], base)]
    seconds = _time(products, device, ["highest", *others]) if others else {}
    return {p: Measured(seconds.get(p), errors[p]) for p in PRECISIONS}


def fastest_accurate(measured: Mapping[MatmulPrecision, Measured]) -> MatmulPrecision:
    """The fastest whose error is float32's; "highest" unless another one is clearly faster."""
    base = measured["highest"]
    if base.seconds is None:
        return "highest"
    timed: dict[MatmulPrecision, float] = {
        p: found.seconds
        for p, found in measured.items()
        if found.seconds is not None and is_accurate(found.error, base.error)
    }
    best: MatmulPrecision = min(timed, key=lambda p: timed[p]) if timed else "highest"
    return best if best != "highest" and timed[best] * _WORTHWHILE < base.seconds else "highest"


def settle(products: Mapping[Product, int], device: torch.device, *, recorded: MatmulPrecision | None) -> Choice:
    """What a run recorded when it began, so that a stop and another clock change no bit; measured when it begins.

    A recorded one that is less exact on this device gives way to "highest".
    """
    if recorded is not None:
        if keeps_accuracy(products, device, recorded):
            return Choice(recorded, "as the run began")
        return Choice("highest", f"the run began with {recorded!r}, which on this device is less exact than float32")
    measured = measure_precisions(products, device)
    chosen = fastest_accurate(measured)
    base, found = measured["highest"], measured[chosen]
    if chosen == "highest" or base.seconds is None or found.seconds is None:
        return Choice("highest", "measured: nothing faster is as exact")
    gain = base.seconds / found.seconds
    return Choice(chosen, f"measured: {gain:.2g} times as fast as 'highest', error {found.error:.0e}")


def is_accurate(error: float, highest: float) -> bool:
    """Whether a product's relative error is float32's, given that of precision "highest"."""
    return error <= min(_ERROR_FACTOR * highest, _LARGEST_ERROR)


def keeps_accuracy(products: Mapping[Product, int], device: torch.device, precision: MatmulPrecision) -> bool:
    """Whether these products have float32's accuracy on this device."""
    if precision == "highest":
        return True
    return is_accurate(product_error(products, device, precision), product_error(products, device, "highest"))


@torch.no_grad()
def product_error(products: Iterable[Product], device: torch.device, precision: MatmulPrecision) -> float:
    """The largest relative error, against float64, of the products' forward pass."""
    rows, columns = _CHECKED
    errors = []
    with _matmul_precision(precision):
        for product in products:
            x, weight, _ = _operands(_shortened(product), device)
            exact = x[:rows].double() @ weight[:columns].double().T
            found = (x @ weight.T)[:rows, :columns].double()
            errors.append(float((found - exact).norm() / exact.norm()))
    return max(errors, default=0.0)


@torch.no_grad()
def _time(
    products: Mapping[Product, int], device: torch.device, precisions: Sequence[MatmulPrecision]
) -> dict[MatmulPrecision, float]:
    """Seconds of all the products, each in its fastest round: other work only ever adds to a time."""
    total = dict.fromkeys(precisions, 0.0)
    for product, count in products.items():
        shortened = _shortened(product)
        operands = _operands(shortened, device)
        fastest = dict.fromkeys(precisions, float("inf"))
        started = time.perf_counter()
        for number in range(_ROUNDS + 1):
            if number > 2 and time.perf_counter() - started > _SECONDS:
                break
            for precision in precisions:
                with _matmul_precision(precision):
                    taken = _seconds_of(*operands)
                if number:  # the first round warms up
                    fastest[precision] = min(fastest[precision], taken)
        for precision, taken in fastest.items():
            total[precision] += taken * count * product.rows / shortened.rows
    return total


def _seconds_of(x: Tensor, weight: Tensor, gradient: Tensor) -> float:
    _wait(x.device)
    started = time.perf_counter()
    x @ weight.T
    gradient @ weight
    gradient.T @ x
    _wait(x.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shortened(product: Product) -> Product:
    affordable = int(_FLOPS / (2 * product.in_features * product.out_features))
    return product._replace(rows=min(product.rows, max(affordable, _FEWEST_ROWS)))


def _operands(product: Product, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and the gradient of x Wᵀ, by a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    rows, inner, outer = product
    shapes = (rows, inner), (outer, inner), (rows, outer)
    x, weight, gradient = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return x, weight, gradient


def current_precision() -> MatmulPrecision:
    """What this process multiplies with."""
    return cast(MatmulPrecision, torch.get_float32_matmul_precision())


@contextmanager
def _matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
