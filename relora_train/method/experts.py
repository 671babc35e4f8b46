"""Low-rank updates of experts that one module holds as 3-D parameters, (experts, out, in): an A and a B an expert.

The module computes as it always does, from W + scaling * B A in the place of W: so every way that transformers has to
multiply experts works. For a forward and backward pass this takes a second copy of a layer's experts. It is summed in
float32: added to weights in bfloat16, a small update would be rounded away. It leaves no place for dropout. The weights
are held in float32, or as codes of int8 or nf4 (frozen.py).
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from relora_train.method.frozen import KINDS, Frozen, dequantize, quantize
from relora_train.method.layer import ReLoRALinear, relora_layers

_PREFIX = "relora_"


class ReLoRAExperts(nn.Module):
    """A and B of one parameter of a module of experts, whose child it is.

    weight (experts, out, in), or (experts, in, out) if it is transposed; lora_A (experts, rank, in), lora_B (experts,
    out, rank). A new one has B = 0 and A undrawn.
    """

    def __init__(self, weight: Tensor, *, rank: int, alpha: float, rank_stabilized: bool, transposed: bool) -> None:
        super().__init__()
        experts, rows, columns = weight.shape
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        self.rank, self.alpha, self.rank_stabilized, self.dropout = rank, alpha, rank_stabilized, 0.0
        self.transposed, self.scaling = transposed, alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.shape, dtype = weight.shape, torch.promote_types(weight.dtype, torch.float32)
        self.scales: Tensor | None
        self.register_buffer("scales", None, persistent=False)
        self.lora_A = nn.Parameter(torch.zeros(experts, rank, in_features, device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(experts, out_features, rank, device=weight.device, dtype=dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """Return W + scaling * B A in the shape of W, rounded as autocast asks. weight: W, or its codes."""
        exact, device = self.exact(weight), weight.device.type
        left, right = (self.lora_A.mT, self.lora_B.mT) if self.transposed else (self.lora_B, self.lora_A)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else exact.dtype
        with torch.autocast(device, enabled=False):
            return torch.baddbmm(exact, left.to(exact.dtype), right.to(exact.dtype), alpha=self.scaling).to(dtype)

    def exact(self, weight: Tensor) -> Tensor:
        """Return the weights, or what their codes stand for."""
        if self.scales is None:
            return weight
        rows = self.shape[:-1].numel(), self.shape[-1]
        codes = weight.view(-1) if KINDS[weight.dtype] == "nf4" else weight.view(rows)
        return dequantize(codes, self.scales, rows, torch.float32).view(self.shape)

    def rounded(self, exact: Tensor, kind: Frozen) -> tuple[Tensor, Tensor | None]:
        """Return codes, with the experts one after the other, and their scales."""
        codes, scales = quantize(exact.reshape(-1, exact.shape[-1]), kind)
        return codes.view(
            len(exact), *((-1,) if kind == "nf4" and exact.shape[-1] % 2 else (exact.shape[1], -1))
        ), scales


def expert_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that hold a matrix for each expert."""
    number = getattr(module, "num_experts", None)
    own = module._parameters.items()
    return [name for name, p in own if p is not None and p.ndim == 3 and p.shape[0] == number and p.is_floating_point()]


def has_experts(model: nn.Module) -> bool:
    """Return True if a module of the model holds experts in one parameter."""
    return any(expert_parameters(module) for module in model.modules()) or any(True for _ in expert_layers(model))


def wrap_experts(module: nn.Module, parameter: str, *, rank: int, alpha: float, rank_stabilized: bool) -> None:
    """Freeze a parameter of a module of experts and give it a low-rank update."""
    weight, transposed = module.get_parameter(parameter), bool(getattr(module, "is_transposed", False))
    layer = ReLoRAExperts(weight, rank=rank, alpha=alpha, rank_stabilized=rank_stabilized, transposed=transposed)
    if not any(True for _ in _updates_of(module)):
        module.register_forward_pre_hook(_put_updated)
        module.register_forward_hook(_put_back, always_call=True)
    module.add_module(f"{_PREFIX}{parameter}", layer.train(module.training))
    weight.requires_grad_(False)


def hold_experts(model: nn.Module, name: str, exact: Tensor, kind: Frozen | None = None) -> None:
    """Hold the exact weights of a parameter of experts as codes of this kind, or of that in which they are held now."""
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    layer, weight = cast(ReLoRAExperts, owner.get_submodule(f"{_PREFIX}{own}")), owner.get_parameter(own)
    codes, layer.scales = layer.rounded(exact.to(weight.device), kind or KINDS[weight.dtype])
    owner.register_parameter(own, nn.Parameter(codes, requires_grad=False))


def unwrap_experts(model: nn.Module) -> None:
    """Leave each module of experts as it was. Merge first."""
    for name, _, owner in list(expert_layers(model)):
        delattr(owner, f"{_PREFIX}{name.rpartition('.')[2]}")
        for hooks, ours in ((owner._forward_pre_hooks, _put_updated), (owner._forward_hooks, _put_back)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
        owner._forward_hooks_always_called.clear()


def low_rank_layers(model: nn.Module) -> dict[str, ReLoRALinear | ReLoRAExperts]:
    """Return all that has an A and a B: first the linear layers by module name, then experts by their parameter's."""
    experts = {name: layer for name, layer, _ in expert_layers(model)}
    return {**dict(relora_layers(model)), **experts}


def expert_layers(model: nn.Module) -> Iterator[tuple[str, ReLoRAExperts, nn.Module]]:
    """Yield the name of each parameter of experts with an update, the update, and the module that holds both."""
    for path, module in model.named_modules():
        for parameter, layer in _updates_of(module):
            yield f"{path}.{parameter}" if path else parameter, layer, module


def _updates_of(module: nn.Module) -> Iterator[tuple[str, ReLoRAExperts]]:
    for name, child in module.named_children():
        if isinstance(child, ReLoRAExperts):
            yield name.removeprefix(_PREFIX), child


def _put_updated(module: nn.Module, inputs: Any) -> None:
    # An entry of the instance's own is found before torch looks among the parameters, whose names stay as they are.
    for parameter, layer in _updates_of(module):
        vars(module)[parameter] = layer(module._parameters[parameter])


def _put_back(module: nn.Module, inputs: Any, output: Any) -> None:
    for parameter, _ in _updates_of(module):
        vars(module).pop(parameter, None)
