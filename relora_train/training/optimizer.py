"""AdamW over named parameters, and its state by their names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relora_train.distributed import like_sharded
from relora_train.errors import ConfigError, ModelError
from relora_train.method.bfloat16_adamw import BFloat16AdamW
from relora_train.method.reset import MOMENTS, moments_of
from relora_train.settings.method import OptimizerConfig

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters with their names, in the model's order: matrices decayed, vectors not.

    Without weight decay, the paper's setting, this is the paper's single group. The official code also decays norms and
    biases when it decays at all.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, settings: OptimizerConfig, *, fused: bool | None = None) -> torch.optim.AdamW:
    """Return AdamW over every trainable parameter; fused = None takes the fused kernel where the device has one.

    With parameters in bfloat16 it is a BFloat16AdamW, with state "8bit" an EightBitAdamW.
    Raises ConfigError if the latter's package is missing.
    """
    groups = parameter_groups(model, weight_decay=settings.weight_decay)
    parameters = [p for group in groups for _, p in group["params"]]
    if not parameters:
        raise ModelError("The model has no trainable parameters, so there is nothing to optimize.")
    numbers = settings.model_dump(include={"betas", "eps", "weight_decay"}) | {"lr": settings.learning_rate}
    if any(p.dtype == torch.bfloat16 for p in parameters):
        return BFloat16AdamW(groups, **numbers)
    if settings.state == "8bit":
        try:
            from relora_train.method.eight_bit_adamw import EightBitAdamW
        except ImportError:
            raise ConfigError(
                "optimizer.state '8bit' needs the package bitsandbytes here: pip install 'relora-train[bitsandbytes]'."
            ) from None
        return EightBitAdamW(groups, **numbers)
    if fused is None:
        fused = all(p.device.type in FUSED_DEVICES for p in parameters)
    # foreach is the default only where fused is refused: it needs as much memory again as the gradients.
    return torch.optim.AdamW(groups, **numbers, fused=fused, foreach=False)


def optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, as_held: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Return each parameter's exp_avg, exp_avg_sq and step by its name in the model, in the model's order.

    The tensors are the optimizer's own, not copies; moments in 8 bits are given in float32, or as_held with their codes
    and scales. Parameters that were never updated have no state and are left out.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if state := optimizer.state.get(parameter):
            moments = dict(zip(MOMENTS, moments_of(optimizer, parameter), strict=True))
            held = state if as_held else {**moments, "step": state["step"]}
            found[name] = {key: value.detach() for key, value in held.items()}
    return found


def load_optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Give the optimizer the state that optimizer_state_by_name returned: the next update is the same, bit for bit.

    The tensors are copied. All state the optimizer had is dropped; a parameter absent from `state` starts without any.
    Nothing is changed if any name or shape does not fit.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unknown = sorted(set(state) - set(parameters))
    if unknown:
        raise ModelError(f"The optimizer state is of another model: no trainable parameter is called {unknown[0]}.")
    for name, moments in state.items():
        for key in MOMENTS:
            if moments[key].shape != parameters[name].shape:
                raise ModelError(
                    f"The optimizer state is of another model: {key} of {name} is {tuple(moments[key].shape)}, "
                    f"the parameter {tuple(parameters[name].shape)}."
                )
    on_device = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    optimizer.state.clear()
    for name, moments in state.items():
        parameter = parameters[name]
        if moments[MOMENTS[0]].dtype == torch.uint8:  # as held
            optimizer.state[parameter] = {
                key: value.to("cpu" if key == "step" else parameter.device, copy=True) for key, value in moments.items()
            }
            continue
        if hasattr(optimizer, "write"):
            optimizer.write(parameter, [moments[key] for key in MOMENTS], step=moments["step"])
            continue
        optimizer.state[parameter] = {
            "step": moments["step"].to(parameter.device if id(parameter) in on_device else "cpu", copy=True),
            **{key: like_sharded(moments[key], parameter) for key in MOMENTS},
        }
