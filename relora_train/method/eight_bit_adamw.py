"""AdamW with both moments in 8 bits: bitsandbytes' update, a scale for each 256 entries (arXiv 2110.02861)."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor

from relora_train.method.reset import MOMENTS

_BLOCK = 256
_FEWEST = 4096  # entries: a smaller tensor keeps float32 moments, as in bitsandbytes


class EightBitAdamW(torch.optim.AdamW):
    """torch's AdamW for float32 parameters whose moments are held as codes with scales.

    state: step, exp_avg and exp_avg_sq as for AdamW, of large tensors as uint8 codes, with their float32 scales.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, fused=False, foreach=False, **settings)
        dynamic_map: Any = functional.create_dynamic_map  # values that codes stand for, relative to their scale
        self._maps: dict[str, Tensor] = {key: dynamic_map(signed=key == "exp_avg") for key in MOMENTS}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: nothing here evaluates twice
        """Do one update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    self.write(parameter, [torch.zeros_like(parameter)] * 2, step=torch.zeros(()))
                state["step"] += 1
                self._update(parameter, parameter.grad, group, state)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        step, rate, decay = int(state["step"]), float(group["lr"]), group["weight_decay"]  # on the CPU: no wait
        moments = [state[key] for key in MOMENTS]
        if moments[0].dtype != torch.uint8:
            functional.optimizer_update_32bit(
                "adam", gradient, parameter, moments[0], beta1, group["eps"], step, rate, moments[1], beta2,
                weight_decay=decay,
            )  # fmt: skip
            return
        maps = [self._map(key, parameter) for key in MOMENTS]
        scales = [state[f"{key}_scales"] for key in MOMENTS]
        functional.optimizer_update_8bit_blockwise(
            "adam", gradient, parameter, moments[0], moments[1], beta1, beta2, 0.0, 0.0, group["eps"], step, rate,
            maps[0], maps[1], scales[0], scales[1], weight_decay=decay,
        )  # fmt: skip

    def read(self, parameter: Tensor) -> list[Tensor]:
        """Return exp_avg and exp_avg_sq in float32."""
        state = self.state[parameter]
        return [
            functional.dequantize_blockwise(
                state[key], absmax=state[f"{key}_scales"], code=self._map(key, parameter), blocksize=_BLOCK
            )
            if state[key].dtype == torch.uint8
            else state[key]
            for key in MOMENTS
        ]

    def write(self, parameter: Tensor, moments: list[Tensor], *, step: Tensor | None = None) -> None:
        """Hold these moments from now on, and Adam's step if it is given."""
        state = self.state[parameter]
        if step is not None:
            state["step"] = step.to("cpu", torch.float32, copy=True)
        for key, moment in zip(MOMENTS, moments, strict=True):
            state[key] = moment.to(parameter.device, torch.float32, copy=True).contiguous()
            if moment.numel() >= _FEWEST:
                code = self._map(key, parameter)
                codes, held = functional.quantize_blockwise(state[key], code=code, blocksize=_BLOCK)
                # Its quantizer on CPUs misses zero by a few codes; what a reset has emptied must stay empty.
                state[key] = codes.masked_fill_(state[key] == 0, int((code == 0).nonzero()))
                state[f"{key}_scales"] = held.absmax

    def _map(self, key: str, parameter: Tensor) -> Tensor:
        self._maps[key] = self._maps[key].to(parameter.device)
        return self._maps[key]
