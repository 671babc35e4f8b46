"""The training steps that are compared: the same transformers Llama, data and AdamW settings, in different hands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.experiments.benchmark.request import ArmRequest, Shape
from relora_train.method.contraction import REFERENCE, LayerShape, flops_per_token
from relora_train.method.fast_path import SharedInput, share_inputs
from relora_train.method.optimizer import build_optimizer
from relora_train.method.relora import DEFAULT_TARGET_MODULES, apply_relora, relora_layers
from relora_train.settings.model import ModelConfig
from relora_train.settings.running import PrecisionConfig
from relora_train.training.evaluate import autocast
from relora_train.training.models.compiling import compile_blocks
from relora_train.training.models.model import attend_without_mask, build_model, next_token_loss

_TARGETS = DEFAULT_TARGET_MODULES["llama"]
_SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@dataclass
class BuiltArm:
    """A model with its optimizer, and the step over tokens (sequences, length + 1)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor], Tensor]
    flops_per_token: float
    """Multiplications and additions of products of matrices, forward and backward."""

    notes: dict[str, str]


def build_arm(request: ArmRequest, device: torch.device) -> BuiltArm:
    """The arm on the device, weights drawn from one seed for all arms."""
    shape = request.shape
    config = ModelConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.sequence_length,
    )
    model = build_model(
        config, vocab_size=shape.vocab_size, eos_id=0, sequence_length=shape.sequence_length, seed=0
    ).to(device)
    builders = {"full": _full, "paper": _paper, "peft": _peft, "ours-full": _ours_full, "ours": _ours}
    return builders[request.arm](model, request, device)


def _full(model: nn.Module, request: ArmRequest, device: torch.device) -> BuiltArm:
    return _eager(model, request, device, linear_flops=6.0 * _wrapped_weights(request.shape))


def _paper(model: nn.Module, request: ArmRequest, device: torch.device) -> BuiltArm:
    for name, linear in list(model.named_modules()):
        if name.rpartition(".")[2] in _TARGETS:
            model.set_submodule(name, _PaperLinear(cast(nn.Linear, linear), request.shape.rank, request.dropout))
    return _eager(model, request, device, linear_flops=_low_rank_flops(request.shape))


def _peft(model: nn.Module, request: ArmRequest, device: torch.device) -> BuiltArm:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=request.shape.rank, lora_alpha=32, lora_dropout=request.dropout, target_modules=list(_TARGETS), bias="none"
    )
    adapted = cast(nn.Module, get_peft_model(cast(Any, model), config))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name or not any(f"{target}." in name for target in _TARGETS))
    return _eager(adapted, request, device, linear_flops=_low_rank_flops(request.shape))


class _PaperLinear(nn.Module):
    """As peft_pretraining/relora.py: three products, dropout stored by autograd, the sum out of place."""

    def __init__(self, linear: nn.Linear, rank: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device=linear.weight.device)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device=linear.weight.device)
        nn.init.zeros_(self.lora_B.weight)
        self.lora_dropout = nn.Dropout(dropout)
        self.scaling = 32 / rank

    def forward(self, x: Tensor) -> Tensor:
        low_rank: Tensor = self.lora_B(self.lora_A(self.lora_dropout(x)))
        return F.linear(x, self.weight) + low_rank * self.scaling


def _eager(model: nn.Module, request: ArmRequest, device: torch.device, *, linear_flops: float) -> BuiltArm:
    """The step that everyone writes: the model's own loss over all logits, torch's default AdamW, clipping."""
    if request.precision == "bfloat16":
        model.bfloat16()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **_SETTINGS)
    forward = cast(Any, torch.compile(model) if request.compile else model)

    def step(tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
        logits = forward(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return BuiltArm(model, optimizer, step, linear_flops + _other_flops(request.shape), {})


def _ours_full(model: nn.Module, request: ArmRequest, device: torch.device) -> BuiltArm:
    flops = 6.0 * _wrapped_weights(request.shape)
    return _our_step(model, request, device, lambda optimizer: {}, linear_flops=flops)


def _ours(model: nn.Module, request: ArmRequest, device: torch.device) -> BuiltArm:
    shape = request.shape
    apply_relora(model, rank=shape.rank, alpha=32, dropout=request.dropout, target_modules=None, seed=0)
    exact = request.precision == "float32"
    if not exact:
        for _, layer in relora_layers(model):
            layer.weight.data = layer.weight.data.bfloat16()
    orders: dict[str, Any] = {}

    def prepare(optimizer: torch.optim.Optimizer) -> dict[str, str]:
        orders.update(share_inputs(model, tokens=shape.tokens, optimizer=optimizer))
        if request.as_with_dropout:
            orders.update(dict.fromkeys(orders, REFERENCE))
            for _, layer in relora_layers(model):
                cast(SharedInput, layer.shared).order = REFERENCE
        return {name.removeprefix("model.layers.0."): str(order) for name, order in orders.items() if ".0." in name}

    built = _our_step(model, request, device, prepare, linear_flops=0.0)
    linear = sum(
        flops_per_token(orders[name], LayerShape(shape.tokens, layer.in_features, (layer.out_features,), shape.rank))
        for name, layer in relora_layers(model)
    )
    built.flops_per_token += linear
    return built


def _our_step(
    model: nn.Module,
    request: ArmRequest,
    device: torch.device,
    prepare: Callable[[torch.optim.Optimizer], dict[str, str]],
    *,
    linear_flops: float,
) -> BuiltArm:
    """As StageTraining.update, without the reading of data."""
    settings = {("learning_rate" if key == "lr" else key): value for key, value in _SETTINGS.items()}
    optimizer = build_optimizer(model.train(), **settings)
    notes = prepare(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    precision = PrecisionConfig(dtype=request.precision)
    attend_without_mask(model)
    if request.compile:
        compile_blocks(model)

    def step(tokens: Tensor) -> Tensor:
        with autocast(precision, device):
            loss = next_token_loss(model, tokens, fused=True) / (tokens.numel() - len(tokens))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return BuiltArm(model, optimizer, step, linear_flops + _other_flops(request.shape), notes)


def _wrapped_weights(shape: Shape) -> int:
    return shape.layers * (4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size)


def _low_rank_flops(shape: Shape) -> float:
    """4ND + 6NrS a layer: W is not trained, the two factors are."""
    sides = shape.layers * (8 * shape.hidden_size + 3 * (shape.hidden_size + shape.intermediate_size))
    return 4.0 * _wrapped_weights(shape) + 6.0 * shape.rank * sides


def _other_flops(shape: Shape) -> float:
    """The head, trained in every arm, and attention's two products."""
    return 6.0 * shape.hidden_size * shape.vocab_size + 12.0 * shape.layers * shape.hidden_size * shape.sequence_length
