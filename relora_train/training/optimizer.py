"""AdamW or one of its rivals over named parameters, and its state by their names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relora_train.distributed import like_sharded
from relora_train.errors import ConfigError, ModelError
from relora_train.method.bfloat16_adamw import BFloat16AdamW
from relora_train.method.factored import Factored
from relora_train.method.layer import lora_parameters
from relora_train.method.reset import MOMENTS, moments_of
from relora_train.method.rules import Rule, RuledAdamW
from relora_train.method.subspace import Subspace
from relora_train.method.targets import check_targets
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

    With parameters in bfloat16 it is a BFloat16AdamW, with state "8bit" an EightBitAdamW, with another kind or
    low_rank_state a RuledAdamW. Raises ConfigError if bitsandbytes is missing, or a subspace is larger than a matrix.
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
    if settings.has_rules:
        return RuledAdamW(_by_rule(groups, rules_of(model, settings)), **numbers, fused=fused)
    # foreach is the default only where fused is refused: it needs as much memory again as the gradients.
    return torch.optim.AdamW(groups, **numbers, fused=fused, foreach=False)


def rules_of(model: nn.Module, settings: OptimizerConfig) -> dict[str, Rule]:
    """Return the rule of each trainable parameter that has one, by name; the others are AdamW's.

    GaLore and Fira project the matrices that ReLoRA wraps by default.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    factors = [name for name, _ in lora_parameters(model)]
    rules: dict[str, Rule] = {}
    if settings.low_rank_state == "factored":
        rules |= dict.fromkeys(factors, Factored())
    if settings.kind == "factored":
        rules |= dict.fromkeys((name for name in names if name not in {*factors}), Factored())
    if settings.projects:
        subspace = Subspace(
            settings.subspace_rank, settings.subspace_steps, settings.subspace_scale, residual=settings.kind == "fira"
        )
        layers = check_targets(model, None, rank=settings.subspace_rank, setting="optimizer.subspace_rank")
        rules |= {name if name in {*names} else f"{name}.weight": subspace for name in layers}
    return rules


def _by_rule(groups: list[dict[str, Any]], rules: Mapping[str, Rule]) -> list[dict[str, Any]]:
    """Return the groups in parts of one rule each; None stands for AdamW."""
    parts = []
    for group in groups:
        for rule in dict.fromkeys(rules.get(name) for name, _ in group["params"]):
            params = [(name, p) for name, p in group["params"] if rules.get(name) == rule]
            parts.append({**group, "params": params, "rule": rule})
    return parts


def state_shapes(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, torch.Size]]:
    """Return the shapes of what a checkpoint has of each parameter that the optimizer updates, by name."""
    rules = {id(p): group.get("rule") for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in rules:
            rule: Rule | None = rules[id(parameter)]
            found[name] = {**dict.fromkeys(MOMENTS, parameter.shape), "step": torch.Size()}
            if rule is not None:
                like = torch.empty(parameter.shape, device="meta")
                found[name] = {key: value.shape for key, value in rule.new_state(like).items()}
    return found


def optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, as_held: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Return each parameter's exp_avg, exp_avg_sq and step, or its rule's state, by its name in the model's order.

    The tensors are the optimizer's own, not copies; moments in 8 bits are given in float32, or as_held with their codes
    and scales. Parameters that were never updated have no state and are left out.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if state := optimizer.state.get(parameter):
            held = state
            if not as_held and MOMENTS[0] in state:
                held = {**dict(zip(MOMENTS, moments_of(optimizer, parameter), strict=True)), "step": state["step"]}
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
    expected = state_shapes(optimizer, model)
    for name, moments in state.items():
        for key, shape in expected[name].items():
            if key not in moments or moments[key].shape != shape:
                found = tuple(moments[key].shape) if key in moments else "absent"
                raise ModelError(
                    f"The optimizer state is of another model: {key} of {name} is {found}, the parameter "
                    f"{tuple(parameters[name].shape)}."
                )
    on_device = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    optimizer.state.clear()
    for name, moments in state.items():
        parameter = parameters[name]
        held = moments.get(MOMENTS[0])
        if held is None or held.dtype == torch.uint8:  # a rule's, or as held
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
