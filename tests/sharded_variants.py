"""The low-rank step as ranks that share a model compute it, beside its formula in float64. Run by many_stages."""

from functools import partial
from pathlib import Path

import torch
from test_compiled import MODELS
from tiny_models import relative_error, token_batch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from relora_train.distributed import Ranks, full_tensor, local_shard, shard_of
from relora_train.method.fast_path import HashMasks, share_inputs
from relora_train.method.graph_path import hash_mask, low_rank_scale
from relora_train.method.layer import ReLoRALinear, relora_layers
from relora_train.method.merge import reinit
from relora_train.method.wrap import apply_relora
from relora_train.training.models.compiling import compile_blocks
from relora_train.training.models.model import attend_without_mask, checkpoint_activations
from relora_train.training.models.pretrained import load_model, load_skeleton
from relora_train.training.sharding import rows_of_checkpoint, shard_model

VARIANTS = [
    (family, compiled, checkpointing)
    for family in MODELS
    for compiled, checkpointing in ((True, True), (True, False), (False, True))
]


def errors_of_variants(ranks: Ranks, directory: Path) -> dict[str, float]:
    """The largest relative error of this rank's logits and of any gradient summed over the ranks, by variant."""
    found = {}
    for family, compiled, checkpointing in VARIANTS:
        files = directory / family
        if ranks.is_first:
            MODELS[family]().save_pretrained(files)
        ranks.barrier()
        outputs, gradients = reference(files, ranks)
        output, model = sharded(files, ranks, compiled=compiled, checkpointing=checkpointing)
        errors = [relative_error(output, outputs[ranks.rank])]
        trained = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        assert trained.keys() == gradients.keys()
        errors += [relative_error(gradient, gradients[name]) for name, gradient in trained.items()]
        found[f"{family}, compiled {compiled}, checkpointing {checkpointing}"] = max(errors)
    return found


def reference(files: Path, ranks: Ranks) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The formula gives what each rank is to get, and the sum of their gradients."""
    model = wrapped(load_model(files))
    fill(model)
    for _, layer in relora_layers(model):
        layer.forward = partial(formula, layer)
    outputs = [pass_of(rank, model) for rank in range(ranks.world_size)]
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sharded(files: Path, ranks: Ranks, *, compiled: bool, checkpointing: bool) -> tuple[Tensor, nn.Module]:
    """In the order of build.py."""
    torch._dynamo.reset()
    model = load_skeleton(files)
    rows_of = rows_of_checkpoint(files, model)
    wrapped(model)
    if compiled:
        compile_blocks(model, backend="aot_eager_decomp_partition")
    shard_model(model, rows_of, ranks)
    fill(model)
    attend_without_mask(model)
    if checkpointing:
        checkpoint_activations(model)
    if not compiled:
        share_inputs(model)
    return pass_of(ranks.rank, model), model


def wrapped(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, LlamaRMSNorm):  # which computes in float32 whatever it is given
                exact = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    apply_relora(model.double().train(), rank=4, alpha=8, dropout=0.25, target_modules=None, seed=0)
    return model


def fill(model: nn.Module) -> None:
    reinit(model, seed=0, cycle=1)
    torch.manual_seed(1)
    for _, layer in relora_layers(model):
        B = 0.1 * torch.randn(layer.lora_B.shape, dtype=torch.float64)
        local_shard(layer.lora_B.detach()).copy_(shard_of(B, layer.lora_B))


def pass_of(rank: int, model: nn.Module) -> Tensor:
    """The logits of a rank's own sequences, under masks of its own; gradients are added up."""
    masks = HashMasks(model)
    torch.manual_seed(10 + rank)
    masks.draw()
    logits = model(input_ids=token_batch(seed=rank), use_cache=False).logits
    logits.backward(torch.randn(logits.shape, dtype=logits.dtype))
    return logits.detach()


def formula(layer: ReLoRALinear, x: Tensor) -> Tensor:
    """W x + b + s / (1 - p) * B A (mask * x)."""
    keep = hash_mask(x.flatten(0, -2), layer.mask_seed, layer.dropout).view(x.shape)
    low_rank = (keep * x) @ layer.lora_A.T @ layer.lora_B.T
    return F.linear(x, layer.weight, layer.bias) + low_rank_scale(layer.scaling, layer.dropout) * low_rank
