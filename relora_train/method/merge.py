"""The merge: W <- W + scaling * B A, then A is drawn anew and B is zero. Algorithm 1 of arXiv 2307.05695."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from relora_train.distributed import full_tensor, local_shard, norm, shard_of
from relora_train.errors import DivergedError, ModelError
from relora_train.method.experts import expert_layers, hold_experts, low_rank_layers
from relora_train.method.layer import ReLoRALinear, lora_parameters, relora_layers, stable_generator

_PROBES = 4
_SMALLEST = 1e-30


def merge_and_reinit(
    model: nn.Module, *, cycle: int, seed: int, masters: MutableMapping[str, Tensor] | None = None
) -> dict[str, LayerMerge]:
    """Leave the model's output unchanged, up to rounding, and its low-rank updates empty and trainable.

    `cycle` is the one just finished; A is drawn for cycle + 1. `masters` as in merge(). The caller resets the
    optimizer's state.
    """
    report = merge(model, masters=masters)
    reinit(model, seed=seed, cycle=cycle + 1)
    return report


@torch.no_grad()
def merge(model: nn.Module, *, masters: MutableMapping[str, Tensor] | None = None) -> dict[str, LayerMerge]:
    """W <- W + scaling * B A in float32 (float64 for a float64 weight), then B <- 0; return a report by module name.

    `masters` hold the exact weights by parameter name ("<module>.weight"). They are updated in place and assigned back,
    and each weight of the model becomes its master, rounded once. So rounding does not build up over cycles. If any
    layer is refused, nothing is changed. No layer's full update is ever held in memory. Each rank of a sharded model
    merges its own rows, and its masters hold just these; A and B are gathered layer by layer.
    """
    layers = dict(relora_layers(model))
    for name, layer in layers.items():
        _check_mergeable(name, layer, masters)
    for name, factor in lora_parameters(model):
        if not local_shard(factor).isfinite().all():
            raise DivergedError(
                f"The low-rank update of {name.rpartition('.')[0]} is not finite; nothing was merged. Lower the "
                "learning rate."
            )
    report = {}
    with matmul_precision("highest"):  # TF32, or "medium" on some processors, would round the update to 3 digits
        for name, layer in layers.items():
            weight = local_shard(layer.weight)
            # On the weight's device: a GPU multiplies in milliseconds what takes a CPU's core a second a layer.
            master = weight if masters is None else masters[f"{name}.weight"].to(weight.device)
            A = full_tensor(layer.lora_A).to(device=master.device, dtype=master.dtype)  # (rank, in)
            B = full_tensor(layer.lora_B).to(device=master.device, dtype=master.dtype)  # (out, rank)
            report[name] = _measure(norm(master, layer.weight), A, B, layer.scaling)
            # In float32 or float64: bfloat16 keeps 3 digits, and of a relative update of 1e-4 it would lose 97 %.
            left, right = (A.T, B.T) if layer.transposed else (B, A)
            left = shard_of(left, layer.weight)
            change = _add(name, master, left, right, layer.scaling)
            if masters is not None:
                masters[f"{name}.weight"] = master
                layer.hold(master)
            report[name] = replace(report[name], master_change=change)
            local_shard(layer.lora_B).zero_()
        for name, experts, owner in list(expert_layers(model)):
            weight, A, B = owner.get_parameter(name.rpartition(".")[2]), experts.lora_A, experts.lora_B
            exact = None if masters is None or experts.scales is None else masters[name].to(weight.device)
            weight = weight if exact is None else nn.Parameter(exact, requires_grad=False)
            merged = _measure_experts(norm(local_shard(weight), weight), A, B, experts.scaling)
            changes = [0.0]
            for W, a, b in zip(*map(local_shard, (weight, A, B)), strict=True):  # ranks hold the same experts of all
                left, right = (a.T, b.T) if experts.transposed else (b, a)
                changes.append(_add(name, W, left.to(W.dtype), right.to(W.dtype), experts.scaling))
            report[name] = replace(merged, master_change=max(changes))
            if masters is not None and exact is not None:
                masters[name] = exact
                hold_experts(model, name, exact)
            local_shard(B).zero_()
    return report


@torch.no_grad()
def reinit(model: nn.Module, *, seed: int, cycle: int) -> None:
    """Draw every A for this cycle from Kaiming uniform(a = sqrt 5), which is U(±1/sqrt(in)), and empty every B.

    A must not be zero too: with both factors zero no gradient reaches either. All ranks draw the same, however the
    model is sharded.
    """
    for name, layer in low_rank_layers(model).items():
        *experts, rank, width = layer.lora_A.shape
        drawn = torch.empty(math.prod(experts) * rank, width, dtype=torch.float32)
        # On the CPU, from the layer's name: the same numbers on any device and for any number of ranks.
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=stable_generator(seed, cycle, name))
        local_shard(layer.lora_A).copy_(shard_of(drawn.view(layer.lora_A.shape), layer.lora_A))
        local_shard(layer.lora_B).zero_()


@dataclass(frozen=True)
class LayerMerge:
    """A merge of one weight in numbers. Norms are Frobenius norms; weight_norm is from before the merge."""

    update_norm: float
    weight_norm: float
    effective_rank: float
    """exp of the entropy of the update's singular values: 1 for one direction, rank for all alike, 0 for no update."""

    master_change: float = 0.0
    """Change of the outputs that the exact weight gives for random inputs, relative to these."""

    @property
    def relative_update_norm(self) -> float:
        """update_norm / weight_norm; 1 if the weight was zero and all of it is now the update."""
        return self.update_norm / self.weight_norm if self.weight_norm else float(self.update_norm > 0)


def _add(name: str, weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> float:
    """Add scaling * left @ right to the weight, and return by how much its outputs then differ from the paths' sum."""
    before = _probe(name, weight) + scaling * (left @ _probe(name, right))
    weight.addmm_(left, right, alpha=scaling)
    return float((_probe(name, weight) - before).norm() / before.norm().clamp_min(_SMALLEST))


def _probe(name: str, matrix: Tensor) -> Tensor:
    """Return the matrix times a few columns of random numbers, the same for each of so many columns."""
    inputs = torch.randn(matrix.shape[1], _PROBES, generator=stable_generator(0, 0, name))
    return matrix @ inputs.to(matrix)


def _measure(weight_norm: float, A: Tensor, B: Tensor, scaling: float) -> LayerMerge:
    """Return the numbers of a merge about to happen, from small triangular factors: B A = Q_B (R_B R_Aᵀ) Q_Aᵀ."""
    R_A = torch.linalg.qr(A.T, mode="r").R  # (rank, rank)
    R_B = torch.linalg.qr(B, mode="r").R
    values = scaling * torch.linalg.svdvals(R_B @ R_A.T)
    total = values.sum()
    rank = float(torch.special.entr(values / total).sum().exp()) if total else 0.0
    return LayerMerge(float(torch.linalg.vector_norm(values)), weight_norm, rank)


def _measure_experts(weight_norm: float, A: Tensor, B: Tensor, scaling: float) -> LayerMerge:
    """Return the numbers of all experts' merge: the norm of all updates, the mean of their effective ranks."""
    each = [_measure(0.0, a.float(), b.float(), scaling) for a, b in zip(full_tensor(A), full_tensor(B), strict=True)]
    ranks = sum(merge.effective_rank for merge in each) / len(each)
    return LayerMerge(math.hypot(*(merge.update_norm for merge in each)), weight_norm, ranks)


def _check_mergeable(name: str, layer: ReLoRALinear, masters: MutableMapping[str, Tensor] | None) -> None:
    if masters is not None and f"{name}.weight" not in masters:
        raise ModelError(f"No master weight is called {name}.weight, so the update of {name} cannot be merged exactly.")
    weight = local_shard(layer.weight)
    sides = (layer.in_features, layer.out_features) if layer.transposed else (layer.out_features, layer.in_features)
    shape = weight.shape if layer.scales is None else sides
    holder, master = ("weight", weight) if masters is None else ("master weight", masters[f"{name}.weight"])
    if master.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"The {holder} of {name} is {master.dtype}. Merged in place, an update smaller than its rounding is lost "
            "for good (bfloat16 keeps 3 digits: of a relative update of 1e-4 it loses 97 %). "
            "Pass `masters`, the float32 weights of the parent checkpoint."
        )
    if master.shape != shape:
        raise ModelError(f"{name}.weight is {tuple(shape)} and its master {tuple(master.shape)}.")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 with this precision of torch.set_float32_matmul_precision, then as before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
