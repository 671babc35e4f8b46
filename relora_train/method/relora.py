"""The method: a frozen weight with a trained low-rank update, merged and started again at the end of every cycle.

y = W x + b + scaling * B (A (dropout(x))), arXiv 2307.05695. All functions here take the bare model (not one wrapped by
DDP or torch.compile): the names of its modules decide what is drawn and what is written. Weights may be sharded by rows
over ranks (sharding.py); all ranks then call together. Not covered: quantized weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.distributed import local, norm, part_of, whole
from relora_train.errors import ConfigError, DivergedError, ModelError, NoTargetModulesError

DEFAULT_TARGET_MODULES = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "vit": ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
}
"""The linear layers of attention and MLP, by the model_type of a transformers config."""


class SharedForward(Protocol):
    """The output of one of several layers for an input (..., in)."""

    def __call__(self, layer: ReLoRALinear, x: Tensor) -> Tensor: ...


class ReLoRALinear(nn.Module):
    """A linear layer whose weight is frozen and whose bias and low-rank update are trained.

    weight (out, in), lora_A (rank, in), lora_B (out, rank). The factors begin as float32, or float64 beside a float64
    weight, whatever lower precision the weight is held in. The scaling is a constant: a trained one would be multiplied
    by B = 0 after a merge, and once at zero itself would never leave it. A new layer has B = 0 and A undrawn.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, dropout: float, rank_stabilized: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.alpha, self.dropout, self.rank_stabilized = rank, alpha, dropout, rank_stabilized
        self.scaling = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.register_parameter("bias", linear.bias)
        device, dtype = linear.weight.device, torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.zeros(rank, linear.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device, dtype=dtype))
        self.shared: SharedForward | None = None
        """Computes this layer with those that read the same input: see fast_path.py. None: the reference below."""

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None and not torch.compiler.is_compiling():
            return self.shared(self, x)
        dropout = self.dropout if self.training else 0.0
        return relora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, dropout)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
        )


def relora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    """W x + b + scaling * B (A (dropout(x))), in the dtype that nn.Linear would give; x (..., in) -> (..., out)."""
    low_rank_input = F.dropout(x, dropout) if dropout > 0 else x
    low_rank = _linear(_linear(low_rank_input, lora_A), lora_B)  # (..., rank) -> (..., out)
    return torch.add(_linear(x, weight, bias), low_rank, alpha=scaling)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for a weight held in another dtype than x; under autocast, autocast decides."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def apply_relora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str] | None,
    seed: int,
    rank_stabilized: bool = False,
    cycle: int = 1,
) -> list[str]:
    """Wrap the target layers in place, leaving the model's function as it was; return their names in the model's order.

    Only the wrapped weights are frozen. `target_modules` are ends of module names, whole segments ("q_proj",
    "self_attn.q_proj"); None takes the layers of DEFAULT_TARGET_MODULES. Embeddings and the output head are never
    wrapped. `cycle` is the one about to start: a run resumed after cycle k draws with cycle = k + 1 what
    merge_and_reinit drew.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"rank = {rank} must be at least 1, alpha = {alpha} above 0 and dropout = {dropout} in [0, 1)")
    if any(True for _ in relora_layers(model)):
        raise ModelError("The model has ReLoRA layers already: call unwrap() on it before wrapping it again.")
    targets = _target_layers(model, target_modules)
    for name, linear in targets.items():
        _check_wrappable(model, name, linear, rank)
    for name, linear in targets.items():
        layer = ReLoRALinear(linear, rank=rank, alpha=alpha, dropout=dropout, rank_stabilized=rank_stabilized)
        model.set_submodule(name, layer.train(linear.training))
        _reinit(layer, name, seed=seed, cycle=cycle)
    return list(targets)


def check_targets(model: nn.Module, target_modules: Sequence[str] | None, *, rank: int) -> None:
    """Refuse what apply_relora would: NoTargetModulesError, ModelError, and ConfigError for a rank above a side.

    Each of the target_modules must name a layer that can be wrapped. The tensors may be on the meta device.
    """
    for name, linear in _target_layers(model, target_modules).items():
        _check_wrappable(model, name, linear, rank)


def _target_layers(model: nn.Module, target_modules: Sequence[str] | None) -> dict[str, nn.Linear]:
    linears = dict(_wrappable_layers(model))
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "(there are none)"
    family = getattr(getattr(model, "config", None), "model_type", None)
    if target_modules is None:
        suffixes: Sequence[str] = DEFAULT_TARGET_MODULES.get(str(family), ())
    else:
        suffixes = [target_modules] if isinstance(target_modules, str) else target_modules
    found = {suffix: [name for name in linears if f".{name}".endswith(f".{suffix}")] for suffix in suffixes}
    if not any(found.values()) or (target_modules is not None and not all(found.values())):
        wanted = f"No target modules are known for the model type {family!r}"
        if target_modules is not None:
            unfit = [f"{suffix!r} ({_why_not(model, suffix)})" for suffix in suffixes if not found[suffix]]
            wanted = f"relora.target_modules names {', '.join(unfit) or 'nothing'}"
        raise NoTargetModulesError(
            f"{wanted}. The linear layers that can be wrapped are called {kinds}: set relora.target_modules to some of "
            "these."
        )
    return {name: linear for name, linear in linears.items() if any(name in names for names in found.values())}


def _why_not(model: nn.Module, suffix: str) -> str:
    """Return what the name stands for in the model, as the reason why it cannot be wrapped."""
    for name, module in model.named_modules():
        if name and f".{name}".endswith(f".{suffix}"):
            if isinstance(module, nn.Embedding):
                return "an embedding, which is trained in full"
            if type(module) is nn.Linear:
                return "the output head, which is trained in full"
            return f"no nn.Linear but a {type(module).__name__}"
    return "no module is called so"


def _wrappable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    for name, module in model.named_modules():
        is_head = module is head or name.rpartition(".")[2] in ("lm_head", "embed_out", "classifier")
        # A subclass of nn.Linear may hold its weight in another form (4-bit, 8-bit).
        if name and type(module) is nn.Linear and not is_head:
            yield name, module


def _check_wrappable(model: nn.Module, name: str, linear: nn.Linear, rank: int) -> None:
    smaller = min(linear.in_features, linear.out_features)
    if rank > smaller:
        raise ConfigError(
            f"relora.rank {rank} exceeds {smaller}, the smaller side of {name}. Lower relora.rank, or leave the layer "
            "out of relora.target_modules."
        )
    holders = [n for n, p in model.named_parameters(remove_duplicate=False) if p is linear.weight]
    if len(holders) > 1:
        raise ModelError(
            f"The weight of {name} is shared ({', '.join(holders)}), so merging an update into it would change the "
            "other place too: leave it out of target_modules."
        )


def relora_layers(model: nn.Module) -> Iterator[tuple[str, ReLoRALinear]]:
    """Every wrapped layer with its module name, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, ReLoRALinear):
            yield name, module


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every A and B with its parameter name (as in model.named_parameters()), in the model's order."""
    for name, layer in relora_layers(model):
        yield f"{name}.lora_A", layer.lora_A
        yield f"{name}.lora_B", layer.lora_B


def stable_generator(seed: int, cycle: int, name: str) -> torch.Generator:
    """A CPU generator that is the same on every rank, device and resume, and touches no global random state."""
    digest = hashlib.sha256(f"{seed}/{cycle}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def _reinit(layer: ReLoRALinear, name: str, *, seed: int, cycle: int) -> None:
    """Draw A from Kaiming uniform(a = sqrt 5), which is U(±1/sqrt(in)), and empty B.

    A must not be zero too: with both factors zero no gradient reaches either.
    """
    drawn = torch.empty(layer.lora_A.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=stable_generator(seed, cycle, name))
    local(layer.lora_A).copy_(part_of(drawn, layer.lora_A))
    local(layer.lora_B).zero_()


@dataclass(frozen=True)
class LayerMerge:
    """What one merge did to one weight. Norms are Frobenius norms; weight_norm is from before the merge."""

    update_norm: float
    weight_norm: float
    effective_rank: float
    """exp of the entropy of the update's singular values: 1 for one direction, rank for all alike, 0 for no update."""

    @property
    def relative_norm(self) -> float:
        """update_norm / weight_norm; 1 where the weight was zero and all of it is now the update."""
        if self.weight_norm == 0:
            return 1.0 if self.update_norm > 0 else 0.0
        return self.update_norm / self.weight_norm


def merge_and_reinit(
    model: nn.Module,
    *,
    cycle: int,
    seed: int,
    masters: MutableMapping[str, Tensor] | None = None,
) -> dict[str, LayerMerge]:
    """Leave the model's output unchanged, up to rounding, and its low-rank updates empty and trainable.

    `cycle` is the one just finished; A is drawn for cycle + 1. `masters` as in merge(). The optimizer
    state is reset by the caller. Source: Algorithm 1 of arXiv 2307.05695.
    """
    report = merge(model, masters=masters)
    reinit(model, seed=seed, cycle=cycle + 1)
    return report


def reinit(model: nn.Module, *, seed: int, cycle: int) -> None:
    """Draw every A for this cycle, and empty every B: the same on every rank, however the model is sharded."""
    for name, layer in relora_layers(model):
        _reinit(layer, name, seed=seed, cycle=cycle)


@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    masters: MutableMapping[str, Tensor] | None = None,
) -> dict[str, LayerMerge]:
    """W <- W + scaling * B A in float32 (float64 for a float64 weight), then B <- 0; a report by module name.

    `masters` hold the exact weights by parameter name ("<module>.weight"), updated in place and assigned back, and each
    weight of the model becomes its master rounded once to the weight's own dtype: rounding does not build up over
    cycles. Nothing is changed if any layer is refused. No layer's full update is ever held in memory. Of a sharded
    model each rank merges its own rows, of which its masters consist; only A and B are gathered, a layer at a time.
    """
    layers = dict(relora_layers(model))
    for name, layer in layers.items():
        _check_mergeable(name, layer, masters)
    report = {}
    with _full_precision_matmul():
        for name, layer in layers.items():
            weight = local(layer.weight)
            master = weight if masters is None else masters[f"{name}.weight"]
            factors = whole(layer.lora_A), whole(layer.lora_B)
            A, B = (factor.to(device=master.device, dtype=master.dtype) for factor in factors)
            report[name] = _measure(norm(master, layer.weight), A, B, layer.scaling)
            master.addmm_(part_of(B, layer.weight), A, alpha=layer.scaling)
            if masters is not None:
                masters[f"{name}.weight"] = master
                weight.copy_(master)
            local(layer.lora_B).zero_()
    return report


def _check_mergeable(name: str, layer: ReLoRALinear, masters: MutableMapping[str, Tensor] | None) -> None:
    if masters is not None and f"{name}.weight" not in masters:
        raise ModelError(f"No master weight is called {name}.weight, so the update of {name} cannot be merged exactly.")
    weight = local(layer.weight)
    master = weight if masters is None else masters[f"{name}.weight"]
    holder = "weight" if masters is None else "master weight"
    if master.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"The {holder} of {name} is {master.dtype}. Merged in place, an update smaller than its rounding is lost "
            "for good (bfloat16 keeps 3 digits: of a relative update of 1e-4 it loses 97 %). "
            "Pass `masters`, the float32 weights of the parent checkpoint."
        )
    if master.shape != weight.shape:
        raise ModelError(f"{name}.weight is {tuple(weight.shape)} and its master {tuple(master.shape)}.")
    if not (local(layer.lora_A).isfinite().all() and local(layer.lora_B).isfinite().all()):
        raise DivergedError(
            f"The low-rank update of {name} is not finite; nothing was merged. Lower the learning rate."
        )


def _measure(weight_norm: float, A: Tensor, B: Tensor, scaling: float) -> LayerMerge:
    """The facts of a merge about to happen, from the small triangular factors: B A = Q_B (R_B R_Aᵀ) Q_Aᵀ."""
    R_A = torch.linalg.qr(A.T, mode="r").R  # (rank, rank)
    R_B = torch.linalg.qr(B, mode="r").R
    singular_values = scaling * torch.linalg.svdvals(R_B @ R_A.T)
    return LayerMerge(
        update_norm=float(torch.linalg.vector_norm(singular_values)),
        weight_norm=weight_norm,
        effective_rank=effective_rank(singular_values),
    )


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the values' shares: 1 for one direction, their number for all alike, 0 for none."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular_values / total).sum().exp())


@contextmanager
def _full_precision_matmul() -> Iterator[None]:
    """TF32, or the bfloat16 passes some processors use for "medium", would round the update to 3 digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def unwrap(model: nn.Module) -> list[str]:
    """Make every wrapped layer an nn.Linear again, its weight trainable; return their names. Merge first.

    The model is then the ordinary model it was before apply_relora, with the same parameter names.
    """
    layers = dict(relora_layers(model))
    unmerged = [name for name, layer in layers.items() if layer.lora_B.count_nonzero() > 0]
    if unmerged:
        raise ModelError(
            f"{len(unmerged)} layers hold an update that was not merged, first {unmerged[0]}: call merge()."
        )
    for name, layer in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.weight.detach())
        if layer.bias is not None:
            linear.bias = layer.bias
        model.set_submodule(name, linear.train(layer.training))
    return list(layers)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every A and B on the CPU, under the names that peft's adapter_model.safetensors uses."""
    return {
        f"base_model.model.{name}.weight": whole(factor.detach()).to("cpu", copy=True)
        for name, factor in lora_parameters(model)
    }


def adapter_config(
    model: nn.Module, *, base_model_name_or_path: str | None = None, task_type: str | None = "CAUSAL_LM"
) -> dict[str, Any]:
    """The content of peft's adapter_config.json for adapter_state(model).

    It describes the low-rank updates alone: embeddings, norms, head and biases trained beside them are the base's.
    """
    layers = dict(relora_layers(model))
    if not layers:
        raise ModelError("The model has no ReLoRA layers, so it has no adapter.")
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rank_stabilized,
        "target_modules": list(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
