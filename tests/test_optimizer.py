import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import backward, relative_error, tiny_llama, train
from torch import nn
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from relora_train.errors import ModelError
from relora_train.method.layer import lora_parameters, relora_layers
from relora_train.method.reset import above_quantile, reset_optimizer_state
from relora_train.method.wrap import apply_relora
from relora_train.settings.method import OptimizerConfig
from relora_train.training.optimizer import (
    FUSED_DEVICES,
    build_optimizer,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    parameter_groups,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(model, *, learning_rate=1e-3, weight_decay=0.0, fused=None):
    adam = OptimizerConfig(learning_rate=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    return build_optimizer(model, adam, fused=fused)


def wrapped_llama():
    model = tiny_llama()
    apply_relora(model, rank=4, alpha=8, dropout=0.0, target_modules=None, seed=0)
    return model


def trained(*, steps=5, fused=None):
    model = wrapped_llama()
    optimizer = adamw(model, fused=fused)
    train(model, optimizer, range(steps))
    return model, optimizer


def snapshot(optimizer, model):
    return copy.deepcopy(optimizer_state_by_name(optimizer, model))


def reset(optimizer, model, **options):
    return reset_optimizer_state(optimizer, lora_parameters(model), **{"ratio": 0.9, **options})


def assert_state_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, state in expected.items():
        assert all(torch.equal(actual[name][key], value) for key, value in state.items()), name


# --- parameter groups and AdamW


def test_every_trainable_parameter_is_in_one_group_by_its_name():
    model = wrapped_llama()
    groups = parameter_groups(model, weight_decay=0.1)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_groups = [pair for group in groups for pair in group["params"]]
    assert len(in_groups) == len(named)
    assert all(named[name] is p for name, p in in_groups)
    decayed, not_decayed = ({name for name, _ in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.lora_A"} <= decayed
    assert all("norm" in name for name in not_decayed)


def test_the_order_of_names_is_the_models():
    model = wrapped_llama()
    order = [name for name, _ in model.named_parameters()]
    for group in adamw(model).state_dict()["param_groups"]:
        assert group["param_names"] == sorted(group["param_names"], key=order.index)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ModelError, match="no trainable parameters"):
        adamw(nn.Linear(3, 3).requires_grad_(False))


def adam_in_float64(gradients, *, learning_rate, betas, eps, weight_decay, start):
    """AdamW as its paper writes it (arXiv 1711.05101)."""
    w, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for step, gradient in enumerate((g.double() for g in gradients), start=1):
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        adam = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        w = w - learning_rate * (weight_decay * w + adam)
    return w


@pytest.mark.parametrize("fused", [None, True, False])
def test_an_update_is_adamw_as_published(fused):
    layer = nn.Linear(30, 20, bias=False)
    start = layer.weight.detach().clone()
    settings = {"learning_rate": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = build_optimizer(layer, OptimizerConfig(**settings), fused=fused)
    gradients = [torch.randn(20, 30, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizer.step()
    expected = adam_in_float64(gradients, start=start, **settings)
    assert relative_error(layer.weight.detach().double(), expected) < 1e-6  # ten float32 updates, 6e-8 each


def test_fused_is_taken_where_the_device_has_it_and_is_deterministic():
    (first, first_optimizer), (second, second_optimizer) = trained(), trained()
    assert all(group["fused"] for group in first_optimizer.param_groups)
    assert_state_equal(snapshot(first_optimizer, first), snapshot(second_optimizer, second))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_fused_kernel_is_asked_for_on_devices_that_torch_has_it_for():
    assert {"cpu", "cuda"} <= set(FUSED_DEVICES) <= set(_get_fused_kernels_supported_devices())


# --- the quantile


@settings(deadline=None)  # a shared machine may pause in mid-example
@given(st.integers(1, 400), st.integers(0, 1000), st.integers(0, 2**31))
def test_the_mask_is_that_of_torchs_interpolated_quantile_in_float64(size, per_mille, seed):
    ratio = per_mille / 1000
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)).abs()
    # Where ratio * (size - 1) is an integer the quantile is an entry, and float64 may miss it by one rounding.
    if per_mille * (size - 1) % 1000 == 0:
        expected = values > values.sort().values[per_mille * (size - 1) // 1000]
    else:
        expected = values > torch.quantile(values.double(), ratio)
    assert torch.equal(above_quantile(values, ratio), expected)


def test_the_share_kept_is_exact_above_torchs_limit_of_elements():
    size = 17_000_000
    # Distinct floats in rising order: the bit patterns from 1.0 upwards.
    values = (torch.arange(size, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.99)
    keep = above_quantile(values, 0.99)
    first_kept = 99 * (size - 1) // 100 + 1  # ranks from 0; the quantile lies at rank 0.99 (n - 1)
    assert keep[first_kept:].all()
    assert not keep[:first_kept].any()


def test_the_ratio_is_the_decimal_that_was_written():
    values = torch.arange(101.0)
    assert 0.29 * 100 < 29  # what float64 makes of it
    assert above_quantile(values, 0.29).sum() == 71


def test_equal_values_are_all_dropped_together():
    assert not above_quantile(torch.ones(50), 0.5).any()
    assert above_quantile(torch.tensor([0.0, 0, 0, 1, 2]), 0.5).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_mask_keeps_its_meaning_in_every_dtype(dtype):
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(above_quantile(values, 0.9), values > values.double().sort().values[int(0.9 * 999)])


# --- resets


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("independent_masks", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.8, 0.99, 1.0])
def test_magnitude_keeps_what_a_float64_reference_keeps(fused, independent_masks, ratio):
    model, optimizer = trained(fused=fused)
    before = snapshot(optimizer, model)
    report = reset(optimizer, model, mode="magnitude", ratio=ratio, independent_masks=independent_masks)
    after = snapshot(optimizer, model)
    zeroed = entries = 0
    for name, _ in lora_parameters(model):
        first, second = (before[name][key].double() for key in MOMENTS)
        for key, moment in zip(MOMENTS, (first, second), strict=True):
            judged = (moment if independent_masks else first).abs().flatten().sort().values
            keep = (moment if independent_masks else first).abs() > judged[math.floor(ratio * (judged.numel() - 1))]
            assert torch.equal(after[name][key].double(), moment * keep)
            zeroed, entries = zeroed + int((~keep).sum()), entries + keep.numel()
        assert torch.equal(after[name]["step"], before[name]["step"])
    assert (report.zeroed, report.entries, report.share_zeroed) == (zeroed, entries, zeroed / entries)
    # 14 layers of few hundred entries: each tensor drops its share to within one entry.
    assert report.share_zeroed == pytest.approx(ratio, abs=0.01)


def test_one_mask_serves_both_moments_unless_told_otherwise():
    for independent_masks in (False, True):
        model, optimizer = trained()
        reset(optimizer, model, mode="magnitude", independent_masks=independent_masks)
        lost = 0
        for name, _ in lora_parameters(model):
            first, second = (snapshot(optimizer, model)[name][key] for key in MOMENTS)
            lost += int(((first != 0) & (second == 0)).sum())
        assert (lost > 0) == independent_masks


@pytest.mark.parametrize("ratio", [0.0, 0.9])
def test_zero_empties_both_moments_and_adams_step_whatever_the_ratio(ratio):
    model, optimizer = trained()
    report = reset(optimizer, model, mode="zero", ratio=ratio)
    for name, _ in lora_parameters(model):
        assert all(value.count_nonzero() == 0 for value in snapshot(optimizer, model)[name].values())
    assert report.share_zeroed == 1


def test_after_zero_the_next_update_is_that_of_a_new_optimizer():
    model, optimizer = trained()
    reset(optimizer, model, mode="zero")
    fresh = copy.deepcopy(model)
    for each, its_optimizer in ((model, optimizer), (fresh, adamw(fresh))):
        backward(each, seed=50)
        its_optimizer.step()
    for (_, after_reset), (_, expected) in zip(lora_parameters(model), lora_parameters(fresh), strict=True):
        assert torch.equal(after_reset, expected)


@pytest.mark.parametrize(("mode", "restart_clock", "rates"), [
    ("magnitude", False, 0.1 / math.sqrt(0.01)), ("random", False, 0.1 / math.sqrt(0.01)),
    ("magnitude", True, 1.0), ("random", True, 1.0), ("zero", False, 1.0), ("zero", True, 1.0),
])  # fmt: skip
def test_a_restarted_clock_makes_the_first_update_of_an_emptied_entry_one_rate(mode, restart_clock, rates):
    """(1 - beta1) / sqrt(1 - beta2) rates where bias correction still counts the updates before. Betas 0.9, 0.99."""
    model, optimizer = trained()
    low_rank = dict(lora_parameters(model))
    for parameter in optimizer.state:
        optimizer.state[parameter]["step"].fill_(10_000)
    reset(optimizer, model, mode=mode, ratio=1.0, restart_clock=restart_clock)
    clocks = {name: state["step"].item() for name, state in snapshot(optimizer, model).items()}
    restarted = restart_clock or mode == "zero"
    assert clocks == {name: 0 if restarted and name in low_rank else 10_000 for name in clocks}
    before = {name: factor.detach().clone() for name, factor in low_rank.items()}
    backward(model, seed=50)
    optimizer.step()
    for name, factor in low_rank.items():
        moved = (factor.detach() - before[name])[factor.grad.abs() > 1e-5].abs()  # eps is 1e-8
        torch.testing.assert_close(moved, torch.full_like(moved, rates * 1e-3), rtol=2e-2, atol=0)


def test_none_changes_nothing():
    model, optimizer = trained()
    before = snapshot(optimizer, model)
    report = reset(optimizer, model, mode="none")
    assert_state_equal(snapshot(optimizer, model), before)
    assert report.zeroed == 0
    assert report.entries > 0


@pytest.mark.parametrize("mode", ["magnitude", "random"])
def test_at_ratio_0_nothing_is_dropped_not_even_the_least_entry(mode):
    model, optimizer = trained()
    before = snapshot(optimizer, model)
    report = reset(optimizer, model, mode=mode, ratio=0.0)
    assert report.zeroed == 0
    assert_state_equal(snapshot(optimizer, model), before)


@pytest.mark.parametrize("mode", ["zero", "magnitude", "random"])
def test_only_the_parameters_given_are_reset(mode):
    model, optimizer = trained()
    before = snapshot(optimizer, model)
    reset(optimizer, model, mode=mode)
    after = snapshot(optimizer, model)
    others = [name for name in before if "lora_" not in name]
    assert others
    assert_state_equal({name: after[name] for name in others}, {name: before[name] for name in others})


@pytest.mark.parametrize("independent_masks", [False, True])
def test_random_drops_its_share_by_one_mask_or_two(independent_masks):
    model = nn.Linear(400, 300, bias=False)
    optimizer = adamw(model)
    model.weight.grad = torch.randn(300, 400)
    optimizer.step()
    state = optimizer.state[model.weight]
    before = {key: state[key].clone() for key in MOMENTS}
    options = {"mode": "random", "ratio": 0.7, "independent_masks": independent_masks}
    report = reset_optimizer_state(optimizer, model.named_parameters(), **options)
    kept = [state[key] != 0 for key in MOMENTS]
    assert report.share_zeroed == pytest.approx(0.7, abs=4 * math.sqrt(0.7 * 0.3 / 120_000))  # 4 standard errors
    assert torch.equal(kept[0], kept[1]) == (not independent_masks)
    for key, keep in zip(MOMENTS, kept, strict=True):
        assert torch.equal(state[key], before[key] * keep)


def test_random_draws_differ_between_tensors():
    model, optimizer = trained()
    for _, p in lora_parameters(model):
        optimizer.state[p]["exp_avg"].fill_(1)
    reset(optimizer, model, mode="random", ratio=0.5)
    masks = [optimizer.state[p]["exp_avg"].flatten()[:64] for _, p in lora_parameters(model)]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 28


def random_reset(*, seed=0, cycle=1, global_seed=0, first_only=False):
    model, optimizer = trained()
    torch.manual_seed(global_seed)
    parameters = list(lora_parameters(model))
    reset_optimizer_state(
        optimizer, parameters[:1] if first_only else parameters[::-1], mode="random", ratio=0.5, seed=seed, cycle=cycle
    )
    return optimizer.state[parameters[0][1]]["exp_avg"]


def test_random_draws_depend_on_seed_cycle_and_name_alone():
    expected = random_reset()
    assert torch.equal(random_reset(global_seed=9), expected)
    assert torch.equal(random_reset(first_only=True), expected)  # neither on the others nor on their order
    assert not torch.equal(random_reset(seed=1), expected)
    assert not torch.equal(random_reset(cycle=2), expected)


def test_parameters_may_come_without_names():
    (named, named_optimizer), (plain, plain_optimizer) = trained(), trained()
    reset(named_optimizer, named, mode="magnitude")
    reset_optimizer_state(plain_optimizer, [p for _, p in lora_parameters(plain)], mode="magnitude", ratio=0.9)
    assert_state_equal(snapshot(plain_optimizer, plain), snapshot(named_optimizer, named))


def test_parameters_without_state_are_left_without():
    model = wrapped_llama()
    optimizer = adamw(model)
    report = reset(optimizer, model, mode="magnitude")
    assert (report.entries, report.zeroed, report.share_zeroed) == (0, 0, 0)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "full"}, "mode = 'full' is not one of none, zero, magnitude, random"),
        ({"mode": "random", "ratio": 1.5}, r"ratio = 1\.5"),
        ({"mode": "magnitude", "ratio": -0.1}, r"ratio = -0\.1"),
    ],
)
def test_a_reset_that_means_nothing_is_refused(options, message):
    model, optimizer = trained()
    with pytest.raises(ValueError, match=message):
        reset(optimizer, model, **options)


# --- state by name


@pytest.mark.parametrize("fused", [True, False])
def test_training_continues_bit_for_bit_from_the_state_by_name(fused):
    model, optimizer = trained(fused=fused)
    resumed = copy.deepcopy(model)
    resumed_optimizer = adamw(resumed, fused=fused)
    load_optimizer_state_by_name(resumed_optimizer, resumed, snapshot(optimizer, model))
    for each, its_optimizer in ((model, optimizer), (resumed, resumed_optimizer)):
        train(each, its_optimizer, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert_state_equal(snapshot(resumed_optimizer, resumed), snapshot(optimizer, model))


def test_the_state_covers_every_trained_parameter_in_the_models_order():
    model, optimizer = trained()
    state = optimizer_state_by_name(optimizer, model)
    assert list(state) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(list(entry) == ["exp_avg", "exp_avg_sq", "step"] for entry in state.values())
    assert all(entry["step"].item() == 5 for entry in state.values())


def test_loaded_state_is_a_copy():
    model, optimizer = trained()
    saved = snapshot(optimizer, model)
    kept = copy.deepcopy(saved)
    load_optimizer_state_by_name(optimizer, model, saved)
    train(model, optimizer, [6])
    assert_state_equal(saved, kept)


def test_loading_drops_what_the_optimizer_had():
    model, optimizer = trained()
    state = snapshot(optimizer, model)
    dropped = next(iter(state))
    del state[dropped]
    load_optimizer_state_by_name(optimizer, model, state)
    assert_state_equal(optimizer_state_by_name(optimizer, model), state)


@pytest.mark.parametrize("fault", ["name", "shape"])
def test_the_state_of_another_model_is_refused_and_nothing_changes(fault):
    model, optimizer = trained()
    before = snapshot(optimizer, model)
    state = copy.deepcopy(before)
    if fault == "name":
        state["model.other.weight"] = state.pop("lm_head.weight")
    else:
        state["lm_head.weight"]["exp_avg_sq"] = torch.zeros(2, 2)
    with pytest.raises(
        ModelError, match=r"model\.other\.weight" if fault == "name" else r"lm_head\.weight is \(2, 2\)"
    ):
        load_optimizer_state_by_name(optimizer, model, state)
    assert_state_equal(snapshot(optimizer, model), before)


def test_frozen_weights_have_no_state():
    model, optimizer = trained()
    frozen = {f"{name}.weight" for name, _ in relora_layers(model)}
    assert not frozen & set(optimizer_state_by_name(optimizer, model))
