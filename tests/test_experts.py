"""Experts that one module holds as 3-D parameters are trained, merged and reset as a matrix of each expert would be."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from safetensors.torch import load_file
from stage_runs import ignore, stage_request, tiny_profile
from tiny_models import logits, relative_error, token_batch
from torch import Tensor

from relora_train.errors import ConfigError, DivergedError, ModelError
from relora_train.method.experts import expert_layers, has_experts, hold_experts, low_rank_layers
from relora_train.method.layer import lora_parameters
from relora_train.method.merge import merge, merge_and_reinit
from relora_train.method.reset import reset_optimizer_state
from relora_train.method.update_size import UpdateMeter
from relora_train.method.wrap import apply_relora, unwrap
from relora_train.training.models.model import next_token_loss
from relora_train.training.models.pretrained import load_model
from relora_train.training.trainer import run_stage

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
LAYOUTS = pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])  # the last holds (in, out)
CODED = ({"frozen": "int8", "dtype": "bfloat16"}, {"frozen": "nf4"})
TOKENS = token_batch(seed=3) % 128


def wrapped(family: str, *, filled: bool = True, **options: Any) -> Any:
    model = family_model(family)
    apply_relora(model, rank=2, alpha=3, dropout=0.1, seed=0, **{"target_modules": EXPERTS, **options})
    if filled:
        fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, factor in lora_parameters(model):
        if name.endswith("lora_B"):
            factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))


def updates(model: Any) -> dict[str, Tensor]:
    """scaling * B A of each expert, one after the other, in the shape of the parameter."""
    found = {}
    for name, layer, _ in expert_layers(model):
        each = [1.5 * (B @ A) for A, B in zip(layer.lora_A.detach(), layer.lora_B.detach(), strict=True)]
        found[name] = torch.stack([update.T if layer.transposed else update for update in each])
    return found


def added(model: Any, changes: dict[str, Tensor], family: str) -> Any:
    """A plain model with these changes in its weights."""
    plain = family_model(family).eval()
    with torch.no_grad():
        for name, change in changes.items():
            plain.get_parameter(name).add_(change)
    return plain


@LAYOUTS
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_way_to_multiply_sees_the_updated_weights(family: str, implementation: str):
    model = wrapped(family)
    expected = added(model, updates(model), family)
    for each in (model, expected):
        each.set_experts_implementation(implementation)
    assert relative_error(logits(expected), logits(family_model(family).eval())) > 1e-3
    assert relative_error(logits(model), logits(expected)) < 1e-6  # float32, the same products


@LAYOUTS
def test_only_the_factors_get_gradients_and_those_of_the_formula(family: str):
    model = wrapped(family)
    plain = added(model, updates(model), family)
    for each in (model, plain):
        next_token_loss(each, TOKENS, fused=False).backward()
    for name, layer, owner in expert_layers(model):
        parameter = owner.get_parameter(name.rpartition(".")[2])
        assert parameter.grad is None and not parameter.requires_grad
        gradient = plain.get_parameter(name).grad
        gradient = gradient.mT if layer.transposed else gradient
        close = {"rtol": 1e-4, "atol": 1e-6 * float(gradient.abs().max())}
        torch.testing.assert_close(layer.lora_B.grad, 1.5 * gradient @ layer.lora_A.mT, **close)
        torch.testing.assert_close(layer.lora_A.grad, 1.5 * layer.lora_B.mT @ gradient, **close)


@LAYOUTS
def test_a_merge_adds_each_experts_update_and_leaves_an_ordinary_model(family: str):
    model, plain = wrapped(family), family_model(family)
    changes, before = updates(model), logits(model)
    report = merge_and_reinit(model, cycle=1, seed=0)
    for name, change in changes.items():
        merged = model.get_parameter(name).detach()
        torch.testing.assert_close(merged, plain.get_parameter(name) + change, rtol=1e-6, atol=1e-7)
        assert report[name].update_norm == pytest.approx(change.norm().item(), rel=1e-5)
        assert report[name].weight_norm == pytest.approx(plain.get_parameter(name).norm().item(), rel=1e-5)
        assert 1 < report[name].effective_rank <= 2
    assert relative_error(logits(model), before) < 1e-6
    names = {name for name, _ in plain.named_parameters()}
    assert unwrap(model) == list(changes)
    assert {name for name, _ in model.named_parameters()} == names
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert relative_error(logits(model), before) < 1e-6 and all(p.requires_grad for p in model.parameters())


def test_a_merge_with_masters_of_other_layers_merges_experts_too():
    model = wrapped("mixtral", target_modules=None)
    before = logits(model)
    masters = {f"{n}.weight": m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "matrix")}
    merge(model, masters=masters)
    assert relative_error(logits(model), before) < 1e-6
    assert not any(layer.lora_B.any() for _, layer, _ in expert_layers(model))


def test_an_update_that_is_not_finite_or_not_merged_is_refused_and_nothing_changes():
    model = wrapped("mixtral", target_modules=None)
    with pytest.raises(ModelError, match="hold an update that was not merged"):
        unwrap(model)
    layer = list(expert_layers(model))[-1][1]
    layer.lora_A.data[0, 0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergedError, match=r"experts\.relora_down_proj is not finite"):
        merge(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or "lora_A" in name


def test_draws_differ_by_expert_and_follow_the_name():
    first, again, later = (dict(lora_parameters(wrapped("mixtral", cycle=c))) for c in (1, 1, 2))
    bound = 1 / math.sqrt(32)
    for name, A in first.items():
        if name.endswith("gate_up_proj.lora_A"):
            assert torch.equal(A, again[name]) and not torch.equal(A, later[name])
            assert len({each[0, 0].item() for each in A}) == len(A)
            assert 0.9 * bound < A.abs().max().item() <= bound


@pytest.mark.parametrize("mode", ["magnitude", "random", "zero"])
def test_the_optimizers_state_is_reset_expert_by_expert(mode: Any):
    torch.manual_seed(0)
    experts = torch.nn.Parameter(torch.randn(3, 10, 10))
    optimizer = torch.optim.Adam([experts])
    scale = torch.tensor([1e-6, 1.0, 1e6])[:, None, None]  # one mask over all would keep the last expert's alone
    experts.grad = torch.randn(3, 10, 10) * scale
    optimizer.step()
    reset_optimizer_state(optimizer, [("x.lora_A", experts)], mode=mode, ratio=0.9)
    kept = [int(each.count_nonzero()) for each in optimizer.state[experts]["exp_avg"]]
    assert kept == [0] * 3 if mode == "zero" else all(0 < number < 30 for number in kept)
    if mode == "magnitude":
        assert kept == [10] * 3


def test_checkpointing_recomputes_with_the_updated_weights():
    found = []
    for checkpointing in (False, True):
        model = wrapped("mixtral").train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        next_token_loss(model, TOKENS, fused=False).backward()
        found.append({name: factor.grad for name, factor in lora_parameters(model)})
        assert not any(name in vars(owner) for _, _, owner in expert_layers(model) for name in ("down_proj",))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_rank_above_a_side_of_an_expert_is_refused():
    with pytest.raises(
        ConfigError, match=r"relora\.rank 20 exceeds 16, .* model\.layers\.0\.mlp\.experts\.gate_up_proj"
    ):
        apply_relora(
            family_model("qwen3_moe", moe_intermediate_size=8),
            rank=20, alpha=1, dropout=0, target_modules=EXPERTS, seed=0,
        )  # fmt: skip


def test_an_updates_size_counts_every_expert():
    model = wrapped("mixtral", filled=False)
    meter = UpdateMeter(model)
    meter.begin()
    fill(model)
    change = math.sqrt(sum(update.square().sum().item() for update in updates(model).values()))
    weight = math.sqrt(sum(model.get_parameter(name).square().sum().item() for name in updates(model)))
    assert meter.end()["relative_weight_change"] == pytest.approx(change / weight, rel=1e-4)


def test_under_autocast_a_small_update_is_not_rounded_away():
    model = family_model("mixtral")
    apply_relora(model, rank=2, alpha=2, dropout=0, target_modules=EXPERTS, seed=0)
    _, layer, owner = next(expert_layers(model))
    weight = owner.gate_up_proj.detach()
    layer.lora_B.data.fill_(1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(weight)
    assert torch.equal(found, (weight + layer.lora_B @ layer.lora_A).bfloat16())
    assert not torch.equal(found, weight.bfloat16())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_experts_are_held_as_codes_and_eight_merges_are_those_of_float32(family: str, kind: Any):
    model, exact = wrapped(family, filled=False), wrapped(family, filled=False)
    masters = {name: exact.get_parameter(name).detach().clone() for name, _, _ in expert_layers(model)}
    for name in masters:
        hold_experts(model, name, masters[name], kind)
        held, layer = model.get_parameter(name), dict(low_rank_layers(model))[name]
        assert held.numel() * held.element_size() == masters[name].numel() * (1 if kind == "int8" else 0.5)
        assert (layer.exact(held) - masters[name]).abs().max() < 0.2 * masters[name].abs().max()
    assert 0 < relative_error(logits(model), logits(exact)) < 0.5 and has_experts(model)
    for cycle in range(8):
        for each in (model, exact):
            fill(each)
        merge_and_reinit(model, cycle=cycle, seed=0, masters=masters)
        merge_and_reinit(exact, cycle=cycle, seed=0)
    for name, master in masters.items():
        assert torch.equal(master, exact.get_parameter(name))
        again = dict(low_rank_layers(model))[name].rounded(master, kind)[0]
        assert torch.equal(model.get_parameter(name), again)


@pytest.mark.parametrize("precision", [*({"dtype": d} for d in ("float32", "bfloat16", "pure-bfloat16")), *CODED])
def test_a_stage_trains_merges_and_commits_experts(precision: dict[str, str], dataset: Path, tmp_path: Path):
    base = family_model("mixtral", vocab_size=300)
    base.save_pretrained(tmp_path / "base")
    profile = tiny_profile(
        model={"pretrained": str(tmp_path / "base")},
        schedule={"warm_start_steps": 0, "cycles": 1, "cycle_length": 3, "warmup_steps": 0, "restart_warmup_steps": 0},
        relora={"rank": 2, "dropout": 0.1},
        batch={"sequence_length": 16},
        precision=precision,
    )
    run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), ignore)
    trained = dict(load_model(tmp_path / "out").named_parameters())
    recorded = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for name, before in base.named_parameters():
        if name.endswith(EXPERTS):
            A, B = (recorded[f"base_model.model.{name}.lora_{factor}"] for factor in "AB")
            change = trained[name] - before
            assert all(each.any() for each in change)
            torch.testing.assert_close(change, 2 * B @ A, rtol=1e-3, atol=1e-6)  # alpha 4 / rank 2
