"""Rivals of AdamW beside their papers' equations, written once more in numpy and float64; and GaLore's own package."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import tiny_llama, train
from torch import Tensor, nn

from relora_train.errors import ConfigError, ModelError
from relora_train.method.factored import Factored
from relora_train.method.layer import lora_parameters
from relora_train.method.reset import reset_optimizer_state
from relora_train.method.rules import Rule, RuledAdamW
from relora_train.method.subspace import Subspace
from relora_train.method.wrap import apply_relora
from relora_train.settings.method import OptimizerConfig
from relora_train.training.optimizer import (
    build_optimizer,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    state_shapes,
)

Array = NDArray[np.float64]
NUMBERS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 8


def gradients(*shape: int, count: int = STEPS) -> list[Array]:
    """Gradients of a low-rank part and noise, whose sizes differ from row to row, column to column and step to step."""
    random = np.random.default_rng(7)
    sizes = np.exp(random.normal(size=(*shape[:-1], 1))) * np.exp(
        random.normal(size=(1,) * (len(shape) - 1) + shape[-1:])
    )
    return [np.exp(random.normal()) * sizes * random.normal(size=shape) for _ in range(count)]


def moved(rule: Rule, start: Array, given: list[Array], **numbers: Any) -> tuple[Array, dict[str, Tensor]]:
    """The parameter after updates by the rule, and the state that is left."""
    parameter = nn.Parameter(torch.tensor(start))
    optimizer = RuledAdamW([{"params": [parameter], "rule": rule}], **{**NUMBERS, **numbers})
    for gradient in given:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach().numpy(), optimizer.state[parameter]


def descend(start: Array, updates: list[Array]) -> Array:
    w = start.copy()
    for update in updates:
        w = (1 - NUMBERS["lr"] * NUMBERS["weight_decay"]) * w - NUMBERS["lr"] * update
    return w


# --- factored


def factored_updates(given: list[Array]) -> list[Array]:
    """Matrices have R, C, d as they are written down, the floor inside the means and the product whole."""
    beta, updates = NUMBERS["betas"][1], []
    R, C = np.zeros(given[0].shape[0]), np.zeros(given[0].shape[1])
    for t, g in enumerate(given, start=1):
        R = beta * R + (1 - beta) * (g**2 + 1e-14).mean(axis=1)
        C = beta * C + (1 - beta) * (g**2 + 1e-14).mean(axis=0)
        d = g * np.sqrt(R.mean() * (1 - beta**t)) / np.sqrt(np.outer(R, C))
        updates.append(d / max(1, np.sqrt((d**2).mean())))
    return updates


@pytest.mark.parametrize("size", [1.0, 1e-7])  # the squares of the small ones are near the floor
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 6), (6, 1)])
def test_a_factored_update_is_the_written_one(shape: tuple[int, int], size: float):
    given, start = [size * gradient for gradient in gradients(*shape)], np.ones(shape)
    given[2] *= 1e-3
    found, state = moved(Factored(), start, given)
    np.testing.assert_allclose(found, descend(start, factored_updates(given)), rtol=1e-12)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (), "row_sq": shape[:1], "column_sq": shape[1:],
    }  # fmt: skip


def test_an_update_is_bounded_and_a_small_one_is_left():
    sizes = [np.sqrt((d**2).mean()) for d in factored_updates([*gradients(5, 9), *(0.01 * g for g in gradients(5, 9))])]
    assert max(sizes) == pytest.approx(1) and min(sizes) < 0.5, "both happen above"


def test_each_expert_counts_by_itself():
    given, start = gradients(3, 4, 5), np.ones((3, 4, 5))
    found, _ = moved(Factored(), start, given)
    for expert in range(3):
        alone = descend(start[expert], factored_updates([g[expert] for g in given]))
        np.testing.assert_allclose(found[expert], alone, rtol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (3, 2, 2, 2)])
def test_a_vector_or_a_kernel_has_all_its_squares(shape: tuple[int, ...]):
    given, start, beta = gradients(*shape), np.ones(shape), NUMBERS["betas"][1]
    v, updates = np.zeros(shape), []
    for t, g in enumerate(given, start=1):
        v = beta * v + (1 - beta) * (g**2 + 1e-14)
        d = g / np.sqrt(v / (1 - beta**t))
        updates.append(d / max(1, np.sqrt((d**2).mean())))
    found, state = moved(Factored(), start, given)
    np.testing.assert_allclose(found, descend(start, updates), rtol=1e-12)
    assert state["sq"].shape == shape


def test_gradients_at_the_floor_neither_vanish_nor_explode_in_float32():
    parameter = nn.Parameter(torch.zeros(4, 6))
    optimizer = RuledAdamW([{"params": [parameter], "rule": Factored()}], **{**NUMBERS, "weight_decay": 0.0})
    parameter.grad = torch.full((4, 6), 1e-9)
    parameter.grad[0] = 0
    optimizer.step()
    moved_by = parameter.detach().abs() / NUMBERS["lr"]
    assert not moved_by[0].any()
    torch.testing.assert_close(moved_by[1:], torch.full((3, 6), 0.01), rtol=1e-2, atol=0)  # 1e-9 / sqrt(1e-14)


# --- GaLore and Fira


def subspace_updates(given: list[Array], *, rank: int, every: int, scale: float, fira: bool, like: list[Array]) -> Any:
    """The published update, for wide matrices. like: subspaces whose signs are taken, for SVD has none."""
    (b1, b2), eps = NUMBERS["betas"], NUMBERS["eps"]
    M = V = np.zeros((rank, given[0].shape[1]))
    updates, limited, last = [], [], 0.0
    for t, G in enumerate(given):
        if t % every == 0:
            U = np.linalg.svd(G)[0][:, :rank]
            signs = np.sign((U * like[t // every]).sum(axis=0))
            P = U * signs
            np.testing.assert_allclose(like[t // every], P, atol=1e-10)
        R = P.T @ G
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps)
        update = P @ N
        if fira:
            S = G - P @ P.T @ G
            for column in range(G.shape[1]):
                S[:, column] *= np.linalg.norm(N[:, column]) / np.linalg.norm(R[:, column])
            limited.append(t > 0 and np.linalg.norm(S) / last > 1.01)
            if limited[-1]:
                S = S / np.linalg.norm(S) * 1.01 * last
            last = float(np.linalg.norm(S))
            update = update + S
        updates.append(scale * update)
    return updates, limited


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("kind", ["galore", "fira"])
def test_an_update_in_a_subspace_is_the_published_one(kind: str, shape: tuple[int, int]):
    """Eight updates with a refresh after every third; of a matrix with more rows it is the transposed one's."""
    given, start = gradients(*shape), np.ones(shape)
    rule = Subspace(rank=2, refresh_steps=3, scale=0.25, residual=kind == "fira")
    like = [moved(rule, start, given[: 3 * k + 1])[1]["subspace"].numpy().copy() for k in range(3)]
    upright = shape[0] > shape[1]
    wide = [g.T for g in given] if upright else given
    updates, limited = subspace_updates(wide, rank=2, every=3, scale=0.25, fira=kind == "fira", like=like)
    found, state = moved(rule, start, given)
    np.testing.assert_allclose(found, descend(start, [u.T for u in updates] if upright else updates), rtol=1e-9)
    assert kind == "galore" or {*limited} == {True, False}, "the bound is reached and not reached"
    short, long = sorted(shape)
    expected = {"step": (), "subspace": (short, 2), "subspace_avg": (2, long), "subspace_avg_sq": (2, long)}
    expected |= {"residual_norm": (1, 1)} if kind == "fira" else {}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("residual", [False, True])
def test_each_expert_has_a_subspace_of_its_own(residual: bool):
    given, start = gradients(3, 4, 5), np.ones((3, 4, 5))
    rule = Subspace(rank=2, refresh_steps=3, scale=0.5, residual=residual)
    found, _ = moved(rule, start, given)
    for expert in range(3):
        np.testing.assert_allclose(found[expert], moved(rule, start[expert], [g[expert] for g in given])[0], rtol=1e-9)


def test_a_column_without_gradient_stays():
    given = [g * (np.arange(6) != 2) for g in gradients(4, 6)]
    found, _ = moved(Subspace(2, 3, 1.0, residual=True), np.zeros((4, 6)), given)
    assert np.isfinite(found).all() and not found[:, 2].any() and (found[:, 3] != 0).all()


@pytest.mark.parametrize(("shape", "count"), [((5, 9), 8), ((9, 5), 3)])
def test_galore_moves_as_its_authors_package(shape: tuple[int, int], count: int):
    """With eps far below. A tall matrix: until the first refresh, from which on signs of singular vectors differ."""
    galore = pytest.importorskip("galore_torch", reason="pip install --editable '.[dev]'")
    given = [g.astype(np.float32) for g in gradients(*shape, count=count)]
    numbers = {**NUMBERS, "eps": 1e-30, "weight_decay": 0.0}
    theirs = nn.Parameter(torch.ones(shape))
    group = {"params": [theirs], "rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    reference = galore.GaLoreAdamW([group], no_deprecation_warning=True, **numbers)
    for gradient in given:
        theirs.grad = torch.tensor(gradient)
        reference.step()
    ours, _ = moved(Subspace(2, 3, 0.25), np.ones(shape, dtype=np.float32), given, eps=1e-30, weight_decay=0.0)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)


# --- a model's optimizer


def wrapped_llama() -> nn.Module:
    model = tiny_llama()
    apply_relora(model, rank=4, alpha=8, dropout=0.0, target_modules=None, seed=0)
    return model


def settings(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 1e-2, "subspace_rank": 3, "subspace_steps": 2, **changes})


KINDS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "factored": (tiny_llama, {"kind": "factored"}, set()),
    "galore": (tiny_llama, {"kind": "galore"}, {"embed", "lm_head", "norm"}),
    "fira": (tiny_llama, {"kind": "fira"}, {"embed", "lm_head", "norm"}),
    "low rank": (wrapped_llama, {"low_rank_state": "factored"}, {"embed", "lm_head", "norm"}),
    "low rank beside factored": (wrapped_llama, {"kind": "factored"}, {"lora_"}),
}
"""A model, its settings, and the parts of names of what is AdamW's."""


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_rules_what_it_says_and_goes_on_bit_for_bit(kind: str):
    make, changes, adams = KINDS[kind]
    model, twin = make(), make()
    optimizer, again = (build_optimizer(each, settings(**changes)) for each in (model, twin))
    train(model, optimizer, range(3))
    state = optimizer_state_by_name(optimizer, model)
    for name, held in state.items():
        assert ("exp_avg" in held) == any(part in name for part in adams), name
        assert {key: value.shape for key, value in held.items()} == state_shapes(optimizer, model)[name]
    twin.load_state_dict(model.state_dict())
    load_optimizer_state_by_name(again, twin, state)
    for each, its_optimizer in ((model, optimizer), (twin, again)):
        train(each, its_optimizer, range(3, 6))  # a refresh of the subspace among them
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_beside_a_rule_adamw_is_as_it_was():
    """Parameters without a rule take the very update of a plain AdamW from the same gradients."""
    plain, ruled = wrapped_llama(), wrapped_llama()
    optimizers = build_optimizer(plain, settings()), build_optimizer(ruled, settings(low_rank_state="factored"))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for a, b in zip(plain.parameters(), ruled.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator) if a.requires_grad else None
            b.grad = None if a.grad is None else a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), (_, b) in zip(plain.named_parameters(), ruled.named_parameters(), strict=True):
        assert torch.equal(a, b) == ("lora_" not in name), name


@pytest.mark.parametrize(("mode", "emptied"), [("none", False), ("magnitude", True), ("random", True), ("zero", True)])
def test_a_merge_empties_a_factored_state_and_its_step(mode: Any, emptied: bool):
    model = wrapped_llama()
    optimizer = build_optimizer(model, settings(low_rank_state="factored"))
    train(model, optimizer, range(3))
    report = reset_optimizer_state(optimizer, lora_parameters(model), mode=mode, ratio=0.9)
    for name, parameter in lora_parameters(model):
        assert all(bool(value.any()) != emptied for value in optimizer.state[parameter].values()), name
    numbers = sum(sum(p.shape) for _, p in lora_parameters(model))
    assert (report.entries, report.zeroed) == (numbers, numbers if emptied else 0)
    others = [state for name, state in optimizer_state_by_name(optimizer, model).items() if "lora_" not in name]
    assert others and all(state["step"] == 3 for state in others)


def test_a_state_of_another_kind_or_size_is_refused():
    model = tiny_llama()
    optimizer = build_optimizer(model, settings(kind="galore"))
    train(model, optimizer, range(1))
    state = optimizer_state_by_name(optimizer, model)
    plain = build_optimizer(model, settings())
    with pytest.raises(ModelError, match=r"exp_avg of model\.layers\.0\.self_attn\.q_proj\.weight is absent"):
        load_optimizer_state_by_name(plain, model, state)
    larger = build_optimizer(model, settings(kind="galore", subspace_rank=4))
    with pytest.raises(ModelError, match=r"subspace of \S+ is \(32, 3\), the parameter \(32, 32\)"):
        load_optimizer_state_by_name(larger, model, state)


def test_a_subspace_larger_than_a_matrix_is_refused():
    with pytest.raises(
        ConfigError, match=r"optimizer\.subspace_rank 33 exceeds 32, the smaller side of .* Lower optim"
    ):
        build_optimizer(tiny_llama(), settings(kind="galore", subspace_rank=33))
