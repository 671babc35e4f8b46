"""AdamW for some groups of parameters and, for others, an update that holds less than two moments a number."""

from typing import Any, Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """How one parameter moves, from its gradient and what is held of the earlier ones."""

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return an empty state, all zeros, with `step` among it."""
        ...

    def direction(
        self, gradient: Tensor, state: dict[str, Tensor], *, betas: tuple[float, float], eps: float
    ) -> Tensor:
        """Take in a gradient, and return what the parameter loses for a rate of 1. state's step counts it already."""
        ...


class RuledAdamW(torch.optim.AdamW):
    """torch's AdamW for groups whose `rule` is None. The parameters of others move by their rule.

    Weight decay is AdamW's for all. The state of a rule has its own names, so that none is taken for a moment.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, foreach=False, **settings)
        for group in self.param_groups:
            group["fused"] = group["fused"] and group["rule"] is None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: nothing here evaluates twice
        """Do one update."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["rule"] is None]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["rule"] is not None else ():
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(group["rule"].new_state(parameter))
                state["step"] += 1  # on the CPU: its powers then cost no wait for a device
                lost = group["rule"].direction(parameter.grad, state, betas=group["betas"], eps=group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(lost, alpha=-group["lr"])
