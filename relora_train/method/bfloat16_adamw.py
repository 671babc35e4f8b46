"""AdamW for parameters held in bfloat16: gradients and both moments too, 8 bytes a parameter where float32 takes 16.

Rounded to the nearest, bfloat16 would lose every update below 1/256 of its weight. A second moment that decays by 0.1 %
a step would never decay. Rounded at random, up as often as the remainder asks, each is right on average. Noise is left:
8 bits of precision in weights and moments, and gradients summed over micro-steps in bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relora_train.method.reset import MOMENTS

_PIECE = 1 << 22  # entries that are computed in float32 at a time: 16 MB each of a few tensors


def round_trained_matrices(model: nn.Module) -> None:
    """Hold every trained matrix in bfloat16. Vectors (norms, biases) stay float32: they are small, and lie near one."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim >= 2:
            parameter.data = parameter.data.to(torch.bfloat16)


class BFloat16AdamW(torch.optim.AdamW):
    """torch's AdamW computed in float32, a piece at a time, and rounded at random to the parameters' dtype.

    For float32 parameters it is AdamW. The random numbers follow from `rounding_seed` alone, the same on all ranks.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, fused=False, foreach=False, **settings)
        self.rounding_seed = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: nothing here evaluates twice
        """Do one update."""
        noise: dict[torch.device, _Noise] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                device = parameter.device
                if device not in noise:
                    noise[device] = _Noise(self.rounding_seed, device)
                self._update(parameter, parameter.grad, group, noise[device])

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], noise: _Noise) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU: its powers then cost no wait for a device
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = state["step"].double()
        first_correction, second_correction = 1 - beta1**step, (1 - beta2**step).sqrt()
        tensors = (parameter.view(-1), gradient.reshape(-1), *(state[moment].view(-1) for moment in MOMENTS))
        for weight, grad, exp_avg, exp_avg_sq in zip(*(torch.split(t, _PIECE) for t in tensors), strict=True):
            g = grad.float()
            m = exp_avg.float().lerp_(g, 1 - beta1)
            v = exp_avg_sq.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
            scale = v.sqrt().div_(second_correction).add_(group["eps"]).mul_(first_correction)
            w = weight.float().mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(m, scale, value=-group["lr"])
            for kept, value in ((weight, w), (exp_avg, m), (exp_avg_sq, v)):
                kept.copy_(round_at_random(value, noise) if kept.dtype == torch.bfloat16 else value)


class _Noise:
    """Uniform integers of 16 bits, a function of the seed, the kind of device and what was drawn before."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._host = np.random.SFC64(seed)  # twelve times faster than torch's generator on a CPU
        self._generator = None if device.type == "cpu" else torch.Generator(device).manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        if self._generator is not None:
            raw = torch.empty(count, dtype=torch.int32, device=self._device)
            return raw.random_(0, 1 << 16, generator=self._generator)
        bits = self._host.random_raw(-(-count // 4)).view(np.uint16)[:count]
        return torch.from_numpy(bits.astype(np.int32))


def round_at_random(values: Tensor, noise: _Noise) -> Tensor:
    """Round float32 (n) to one of its two bfloat16 neighbours, so that the mean is the value; nan and inf stay."""
    bits = values.view(torch.int32) + noise.draw(len(values))
    rounded = (bits & -(1 << 16)).view(torch.float32)  # bfloat16 is the upper half of float32
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
