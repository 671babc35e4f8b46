"""Updates inside the backward pass: a parameter moves as soon as its gradient is made, and the gradient is freed."""

from functools import partial
from typing import Any

import torch
from torch import Tensor


class EarlyUpdates:
    """Hooks by which an optimizer's parameters move one by one during a backward pass: the only one of an update.

    The result is that of an update after the pass, bit for bit: no weight is read once its own gradient is whole. Only
    the gradients exist that the pass has begun and not ended. Rates must be set before the pass. Parameters whose
    updates share random numbers (bfloat16_adamw.py) are not for this.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._squares: list[Tensor] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update, group))

    def take_norm(self) -> Tensor:
        """Return the norm of all gradients since this was last asked."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:  # torch calls hooks with one; for the type checker
            return
        self._squares.append(gradient.square().sum())
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None
