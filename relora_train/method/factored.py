"""Adam's second moment from row and column means, without momentum: two vectors where Adam holds two matrices.

The factored second moment and the bound of an update are Adafactor's (arXiv 1804.04235). Rate and decay are plain.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-14
"""Added to every squared gradient."""


@dataclass(frozen=True)
class Factored:
    """g / sqrt(R C / mean(R)) of a matrix, divided by its root mean square where that is above 1.

    R and C are running means of g² + FLOOR over rows and columns, by the second of the betas, corrected for their
    start. Each expert's matrix counts by itself. Anything else than a matrix (norms, biases, kernels of convolutions)
    has all its running squares. Betas' first, the momentum, and eps are not used.
    """

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return step, and row_sq (..., rows) and column_sq (..., columns), or sq like the parameter."""
        held = {"step": torch.zeros(())}
        if parameter.ndim not in (2, 3):
            return held | {"sq": torch.zeros_like(parameter)}
        *experts, rows, columns = parameter.shape
        return held | {
            "row_sq": parameter.new_zeros(*experts, rows),
            "column_sq": parameter.new_zeros(*experts, columns),
        }

    def direction(
        self, gradient: Tensor, state: dict[str, Tensor], *, betas: tuple[float, float], eps: float
    ) -> Tensor:
        """Return the update for a rate of 1."""
        beta = betas[1]
        started = 1 - beta ** int(state["step"])
        square = gradient.square()
        if "sq" in state:
            state["sq"].lerp_(square, 1 - beta)
            update = gradient * (state["sq"] / started + FLOOR).rsqrt()
            return update / update.square().mean().sqrt().clamp_min(1)
        # The floor is added here: what is held stays zero for as long as no gradient comes, and so tells of it.
        rows = state["row_sq"].lerp_(square.mean(-1), 1 - beta) / started + FLOOR
        columns = state["column_sq"].lerp_(square.mean(-2), 1 - beta) / started + FLOOR
        # The two roots stay apart: of 1e-14 times 1e-14 float32 has three digits left, of smaller ones none.
        by_row = (rows / rows.mean(-1, keepdim=True)).rsqrt()
        update = gradient * by_row.unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)
        return update / update.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1)
