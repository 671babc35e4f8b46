"""The layer as torch.compile takes it: hashed masks, one graph for all blocks and cycles, the reference's function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stage_runs import CPU, stage_request, tiny_profile
from tiny_models import COMPILER_WARNINGS, relative_error, saved_bytes, tiny_gpt_neox, tiny_llama, token_batch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import ViTConfig, ViTForImageClassification

from relora_train.distributed import Ranks, full_tensor, local_shard
from relora_train.method.fast_path import HashMasks, share_inputs
from relora_train.method.graph_path import dropped_steps, hash_mask, linears_in_graph, low_rank_scale
from relora_train.method.layer import relora_layers
from relora_train.method.merge import merge_and_reinit, reinit
from relora_train.method.wrap import apply_relora
from relora_train.training import build
from relora_train.training.build import prepare_stage
from relora_train.training.models.compiling import compile_blocks, without_compiling
from relora_train.training.models.model import (
    attend_without_mask,
    blocks,
    checkpoint_activations,
    embedding,
    next_token_loss,
    round_residual,
)
from relora_train.training.models.pretrained import load_skeleton
from relora_train.training.sharding import rows_of_checkpoint, shard_model

pytestmark = COMPILER_WARNINGS

MODELS: dict[str, Callable[[], nn.Module]] = {"llama": tiny_llama, "gpt_neox": tiny_gpt_neox}


def seeds(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# --- the mask


@pytest.mark.parametrize("dropout", [0.1, 0.0123, 0.5, 0.999])
def test_a_hashed_mask_drops_its_share_whatever_the_seed(dropout: float):
    rows, share = torch.empty(512, 384), dropped_steps(dropout) / 65_536
    numbers = torch.randint(-(2**31), 2**31, (40, 2), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    dropped = torch.stack([1 - hash_mask(rows, seed, dropout).double().mean() for seed in numbers])
    one = (share * (1 - share) / rows.numel()) ** 0.5
    assert (dropped - share).abs().max() < 5 * one
    assert abs(dropped.mean() - share) < 4 * one / 40**0.5
    assert 0.5 * one < dropped.std() < 1.6 * one  # as far apart as draws, no farther and no nearer


def test_entries_of_a_hashed_mask_are_independent_of_each_other_and_of_other_seeds():
    rows, seed = torch.empty(512, 384), seeds(12345, 678)
    mask = hash_mask(rows, seed, 0.5).double() - 0.5
    others = [mask.roll(1, 1), mask.roll(1, 0), mask.roll(7, 1), mask.flip(0), mask.roll(rows.numel() // 2)]
    others += [hash_mask(rows, seeds(*other), 0.5).double() - 0.5 for other in ((12346, 678), (12345, 680), (0, 0))]
    for other in others:
        assert abs(float((mask * other).mean()) * 4) < 5 / rows.numel() ** 0.5
    assert (mask.mean(0).abs() < 5 * 0.5 / 512**0.5).all() and (mask.mean(1).abs() < 5 * 0.5 / 384**0.5).all()


def test_a_hashed_mask_is_that_of_its_definition():
    """In Python's own integers: nothing depends on how a device's int32 overflows."""
    n, d, (offset, odd) = 6, 5, (-(2**31) + 7, 2**31 - 2)
    expected = []
    for i in range(n * d):
        x = (i * (odd | 1) + offset) % 2**32
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        x ^= x >> 15
        expected.append(x & 0xFFFF >= dropped_steps(0.3))
    made = hash_mask(torch.empty(n, d), seeds(offset, odd), 0.3)
    assert made.flatten().tolist() == expected


# --- the function


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_formula(dropout: float, bias: bool):
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    torch.manual_seed(0)
    x, seed, scale = drawn(2, 5, 12), seeds(3, 4), low_rank_scale(2.0, dropout)
    layers = [
        (drawn(out, 12).detach(), drawn(out) if bias else None, drawn(rank, 12), drawn(out, rank))
        for out, rank in ((8, 3), (6, 3), (6, 2))
    ]
    trained = [x, *(t for layer in layers for t in layer[1:] if t is not None)]
    keep = hash_mask(x.flatten(0, 1), seed, dropout).view(x.shape) if dropout else torch.ones(x.shape)
    expected = [x @ weight.T + scale * ((keep * x) @ A.T @ B.T) + (0 if b is None else b) for weight, b, A, B in layers]
    made = linears_in_graph(x, layers, scale, seed if dropout else None, dropout)
    cotangents = [torch.randn_like(y) for y in expected]
    gradients = [torch.autograd.grad(ys, trained, cotangents) for ys in (made, expected)]
    for ours, theirs in zip([*made, *gradients[0]], [*expected, *gradients[1]], strict=True):
        assert relative_error(ours, theirs) < 1e-14


def losses_and_gradients(model: nn.Module, masks: HashMasks) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    masks.draw()
    loss = next_token_loss(model, token_batch())
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return loss.detach(), gradient


def wrapped(make: Callable[[], nn.Module], *, dropout: float = 0.25) -> nn.Module:
    model = make().train()
    apply_relora(model, rank=4, alpha=8, dropout=dropout, target_modules=None, seed=0)
    torch.manual_seed(1)
    for _, layer in relora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_eager_and_compiled_code_draw_the_same_masks(family: str, checkpointing: bool):
    torch._dynamo.reset()
    made = []
    for compiled in (False, True):
        model = wrapped(MODELS[family])
        if checkpointing:
            checkpoint_activations(model)
        masks = HashMasks(model)
        if compiled:
            compile_blocks(model, backend="aot_eager")
        else:
            share_inputs(model)
        made.append(losses_and_gradients(model, masks))
    (loss, gradient), (compiled_loss, compiled_gradient) = made
    assert relative_error(compiled_loss, loss) < 1e-6
    assert relative_error(compiled_gradient, gradient) < 1e-5  # another mask moves it by a tenth


def test_masks_are_drawn_anew_and_shared_by_layers_that_read_one_input():
    model = wrapped(tiny_llama)
    masks = HashMasks(model)
    torch.manual_seed(0)
    masks.draw()
    layers, before = dict(relora_layers(model)), {}
    for name, layer in layers.items():
        assert layer.mask_seed is not None
        before[name] = tuple(layer.mask_seed.tolist())
    prefix = next(iter(layers)).partition("self_attn")[0]
    assert before[f"{prefix}self_attn.q_proj"] == before[f"{prefix}self_attn.v_proj"]
    assert len(set(before.values())) == 4 * 2  # inputs that layers of two blocks read
    masks.draw()
    assert all(
        tuple(layer.mask_seed.tolist()) != before[name] for name, layer in layers.items() if layer.mask_seed is not None
    )


# --- the graphs


def tiny_vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4,
        num_channels=1, num_labels=4, attn_implementation="sdpa",
    )  # fmt: skip
    return ViTForImageClassification(config)


@pytest.mark.parametrize("family", [*MODELS, "vit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_blocks_and_cycles_share_one_graph_without_a_break(family: str, checkpointing: bool):
    """A short last micro-batch takes one more; an evaluation between, an update and a merge take none."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = wrapped(MODELS.get(family, tiny_vit))
    if family != "vit":
        attend_without_mask(model)
    if checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    masks, counter = HashMasks(model), CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter)

    def update(examples: int) -> None:
        masks.draw()
        forward(model, examples).backward()
        optimizer.step()
        optimizer.zero_grad()

    # The loss's rows take one more; transformers names ViT's embeddings beside its layers.
    kinds = len({type(block) for block in blocks(model)}) + (family != "vit")
    update(4)
    update(4)
    assert counter.frame_count == kinds == 2
    update(3)
    assert counter.frame_count == 2 * kinds
    model.eval()
    with torch.no_grad(), without_compiling():
        forward(model, 4)
        forward(model, 1)
    model.train()
    update(4)
    merge_and_reinit(model, cycle=1, seed=0)
    update(4)
    update(3)
    assert counter.frame_count == 2 * kinds
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture
def one_rank() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield CPU
    dist.destroy_process_group()


def test_blocks_of_a_sharded_model_are_compiled_too(one_rank: Ranks, tmp_path: Path):
    """torch runs a block that is compiled after fully_shard eagerly, and says nothing."""
    torch._dynamo.reset()
    tiny_llama().save_pretrained(tmp_path)
    gradients = []
    for compiled in (False, True):
        model = load_skeleton(tmp_path)
        rows_of = rows_of_checkpoint(tmp_path, model)
        apply_relora(model, rank=4, alpha=8, dropout=0.25, target_modules=None, seed=0)
        counter = CompileCounterWithBackend("aot_eager")
        if compiled:
            compile_blocks(model, backend=counter)
        shard_model(model, rows_of, one_rank)
        reinit(model, seed=0, cycle=1)
        torch.manual_seed(1)
        for _, layer in relora_layers(model):
            nn.init.normal_(local_shard(layer.lora_B), std=0.1)
        masks = HashMasks(model.train())
        attend_without_mask(model)
        if not compiled:
            share_inputs(model)
        for sequences in (4, 4, 3):
            torch.manual_seed(5)
            masks.draw()
            next_token_loss(model, token_batch()[:sequences]).backward()
        assert counter.frame_count == (4 if compiled else 0)  # blocks and loss, a whole micro-batch and a short one
        grads = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        gradients.append(grads)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5


def test_a_stage_compiles_its_blocks_before_it_shards_them(
    one_rank: Ranks, warm_start: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    for name in ("compile_blocks", "shard_model"):
        made = getattr(build, name)
        monkeypatch.setattr(build, name, lambda *a, name=name, made=made, **o: (order.append(name), made(*a, **o))[1])
    monkeypatch.setattr(build, "can_compile", lambda device, required: True)
    profile = tiny_profile(launch={"compile": True}, relora={"dropout": 0.0})
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "out", warm_start)
    prepare_stage(request, replace(one_rank, sharded=True))
    assert order == ["compile_blocks", "shard_model"]


def forward(model: nn.Module, examples: int) -> Any:
    if isinstance(model, ViTForImageClassification):
        return model(torch.randn(examples, 1, 8, 8), labels=torch.zeros(examples, dtype=torch.int64)).loss
    return next_token_loss(model, token_batch()[:examples])


# --- what is kept for the backward pass


def bfloat16_loss(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return next_token_loss(model, token_batch())


def test_elementwise_results_are_made_again_and_the_gradients_stay():
    kept, gradients = [], []
    for recompute in (False, True):
        torch._dynamo.reset()
        model = wrapped(tiny_llama)
        attend_without_mask(model)
        masks = HashMasks(model)
        compile_blocks(model, recompute=recompute, backend="aot_eager_decomp_partition")
        kept.append(saved_bytes(model, lambda model=model: bfloat16_loss(model)))
        gradients.append(losses_and_gradients(model, masks)[1])
    assert kept[1] < 0.75 * kept[0]
    assert relative_error(gradients[1], gradients[0]) < 1e-5


def test_a_rounded_residual_is_half_as_large_and_evaluation_does_not_see_it():
    kept, losses = [], []
    for rounded in (False, True):
        model = wrapped(tiny_llama, dropout=0.0)
        attend_without_mask(model)
        if rounded:
            round_residual(embedding(model))
        dtypes: set[torch.dtype] = set()
        for block in blocks(model):
            block.register_forward_hook(lambda module, inputs, output, seen=dtypes: seen.add(output.dtype))
        share_inputs(model)
        kept.append(saved_bytes(model, lambda model=model: bfloat16_loss(model)))
        assert dtypes == {torch.bfloat16 if rounded else torch.float32}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            trained = next_token_loss(model, token_batch())
            losses.append((trained, next_token_loss(model.eval(), token_batch())))
    assert kept[1] < 0.9 * kept[0]
    assert losses[0][0] != losses[1][0] and relative_error(losses[1][0], losses[0][0]) < 1e-3
    assert losses[0][1] == losses[1][1]
