"""The float32 matmul precision of torch that keeps float32's accuracy here: measured, not assumed.

"medium" is TF32 or bfloat16 on some devices. On many CPUs it is merely another library, as exact and up to twice as
fast. So the error of the model's own products is measured, and what rounds more than float32 is refused.
"""

import logging
from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

import torch
from torch import nn

from relora_train.distributed import Ranks
from relora_train.method.merge import matmul_precision
from relora_train.settings.profile import Profile
from relora_train.training.models.registry import facts_of

MatmulPrecision = Literal["highest", "high", "medium"]

_ERROR_FACTOR = 4
"""Float32 products that add up in another order differ in error by less: up to 2.2 times, MKL and oneDNN, sums of 16
to 11,000 terms. The next coarser way, three bfloat16 passes, is 40 times off, TF32 a thousand times."""

_LARGEST_ERROR = 1e-5
"""Relative error. Float32 has 1e-7 to 1e-6, three bfloat16 passes 1e-5, TF32 3e-4, bfloat16 2e-3."""

_FLOPS, _FEWEST_ROWS = 2e8, 64  # of a product that is measured: fewer rows of it tell as much
_CHECKED = (32, 512)  # rows and columns of a product that are made again in float64

_LOGGER = logging.getLogger(__name__)


class Product(NamedTuple):
    """The product x Wᵀ for x (rows, in_features) and W (out_features, in_features)."""

    rows: int
    in_features: int
    out_features: int


def settle_matmul_precision(
    profile: Profile, model: nn.Module, ranks: Ranks, *, recorded: MatmulPrecision | None
) -> MatmulPrecision | None:
    """Set what precision.matmul_precision = 'auto' stands for, the same on all ranks; return None for other settings.

    recorded: what the parent or the snapshot says that the run computes with. It stays, so that a stop changes no bit.
    Under autocast the products are in bfloat16 whatever this is.
    """
    if profile.precision.matmul_precision != "auto":
        return None
    chosen: MatmulPrecision = "highest"
    if ranks.is_first and not profile.precision.computes_in_bfloat16:
        rows = profile.batch.forward_passes(ranks.world_size)[0] * facts_of(profile).rows_per_sequence()
        chosen = choose_precision(products_of(model, rows=rows), ranks.device, recorded=recorded)
    chosen = cast(MatmulPrecision, ranks.share_text(chosen))
    torch.set_float32_matmul_precision(chosen)
    return chosen


def choose_precision(
    products: Iterable[Product], device: torch.device, *, recorded: MatmulPrecision | None
) -> MatmulPrecision:
    """Return "medium" for a new run and the recorded precision for others, as far as these are as exact as float32."""
    wanted = recorded or "medium"
    if keeps_accuracy(products, device, wanted):
        return wanted
    if recorded is not None:
        _LOGGER.warning(
            "The run began with matmul precision %r, which on this device is less exact than float32: 'highest' is "
            "taken, and results will differ in their last bits.",
            recorded,
        )
    return "highest"


def products_of(model: nn.Module, *, rows: int) -> set[Product]:
    """Return the model's products with its matrices, embeddings aside, for an input of so many rows."""
    return {
        Product(rows, parameter.shape[1], parameter.shape[0])
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 2
    }


def keeps_accuracy(products: Iterable[Product], device: torch.device, precision: MatmulPrecision) -> bool:
    """Return True if these products have float32's accuracy on this device."""
    if precision == "highest":
        return True
    products = list(products)
    highest = product_error(products, device, "highest")
    return product_error(products, device, precision) <= min(_ERROR_FACTOR * highest, _LARGEST_ERROR)


@torch.no_grad()
def product_error(products: Iterable[Product], device: torch.device, precision: MatmulPrecision) -> float:
    """Return the largest relative error, against float64, of the products; each as a norm over its entries."""
    rows, columns = _CHECKED
    errors = []
    with matmul_precision(precision):
        for product in products:
            affordable = int(_FLOPS / (2 * product.in_features * product.out_features))
            generator = torch.Generator().manual_seed(0)
            made = min(product.rows, max(affordable, _FEWEST_ROWS))
            x = torch.randn(made, product.in_features, generator=generator).to(device)
            weight = torch.randn(product.out_features, product.in_features, generator=generator).to(device)
            exact = x[:rows].double() @ weight[:columns].double().T
            found = (x @ weight.T)[:rows, :columns].double()
            errors.append(float((found - exact).norm() / exact.norm()))
    return max(errors, default=0.0)
