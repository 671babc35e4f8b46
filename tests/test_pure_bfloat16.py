"""Trained matrices, gradients and Adam's state in bfloat16: right on average, exact where it is merged and saved."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import CPU, ignore, manifest_of, metrics_of, run_all, stage_request, tiny_profile
from torch import nn
from transformers import AutoModelForCausalLM

from relora_train.method.bfloat16_adamw import BFloat16AdamW, _Noise, round_at_random, round_trained_matrices
from relora_train.training.build import prepare_stage
from relora_train.training.files import SavedOptimizerState, read_tensor
from relora_train.training.trainer import run_stage

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
PURE = {"precision": {"dtype": "pure-bfloat16"}}


@pytest.fixture(scope="module")
def checkpoints(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_all(tiny_profile(**PURE), dataset, tmp_path_factory.mktemp("run"))


def noise(seed: int = 0) -> _Noise:
    return _Noise(seed, torch.device("cpu"))


@pytest.mark.parametrize("value", [1.003, -1.003, 3e-39, 65_000.3, 0.0])
def test_rounding_gives_the_neighbours_and_their_mean_is_the_value(value: float):
    exact = torch.full((200_000,), value)
    rounded = round_at_random(exact, noise()).double()
    spacing = 2.0 ** (max(math.frexp(value)[1] - 1, -126) - 7) if value else 0.0
    assert ((rounded - exact.double()).abs() <= spacing).all()
    assert len(rounded.unique()) <= 2
    # The mean of n draws is off by at most half a spacing / sqrt(n) a standard deviation; five of them.
    assert abs(rounded.mean().item() - exact[0].double().item()) <= 2.5 * spacing / math.sqrt(len(exact))


def test_what_bfloat16_can_hold_stays_and_so_does_what_is_not_finite():
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_at_random(exact.float(), noise()), exact)
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # NaN, as a GPU writes it
    odd = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), all_ones])
    rounded = round_at_random(odd, noise())
    assert rounded[:2].tolist() == [math.inf, -math.inf] and rounded[2:].isnan().all()


def test_on_float32_parameters_it_is_adamw():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    optimizers = BFloat16AdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    for _ in range(20):
        gradient = torch.randn(40, 30)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_updates_too_small_for_bfloat16_arrive_and_torch_loses_them():
    """Weights of one, 400 updates of 1e-4: each is a 78th of the spacing of bfloat16 below one's."""
    moved = {}
    for kind, settings in ((BFloat16AdamW, {}), (torch.optim.AdamW, {"foreach": False})):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = kind([weight], lr=1e-4, weight_decay=0.0, **settings)
        for step in range(400):
            if isinstance(optimizer, BFloat16AdamW):
                optimizer.seed_rounding(step)
            weight.grad = torch.full_like(weight, 0.5)
            optimizer.step()
        moved[kind] = 1 - weight.detach().float().mean().item()
    assert moved[BFloat16AdamW] == pytest.approx(0.04, rel=0.05)
    assert moved[torch.optim.AdamW] == 0


def test_the_second_moment_decays_as_in_float32():
    """beta2 = 0.999: rounded to the nearest, a tenth of a percent a step would be lost for ever."""
    weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = BFloat16AdamW([weight], lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(501):
        optimizer.seed_rounding(step)
        weight.grad = torch.full_like(weight, float(step == 0))
        optimizer.step()
    found = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert found == pytest.approx(0.001 * 0.999**500, rel=0.02)


def test_matrices_their_gradients_and_moments_are_bfloat16_and_vectors_float32(
    checkpoints: dict[str, Path], dataset: Path, tmp_path: Path
):
    request = stage_request(tiny_profile(**PURE), "cycle-1", dataset, tmp_path, checkpoints["warm-start"])
    training = prepare_stage(request, CPU)
    training.update(7)
    assert {p.dtype for p in training.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    for parameter in training.trainable:
        expected = torch.bfloat16 if parameter.ndim >= 2 else torch.float32
        state = training.optimizer.state[parameter]
        assert {t.dtype for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])} == {expected}


def test_checkpoints_are_float32_and_open_anywhere(checkpoints: dict[str, Path]):
    for checkpoint in checkpoints.values():
        tensors = load_file(checkpoint / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        opened = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
        assert all(torch.equal(opened[name], tensor) for name, tensor in tensors.items())
        for entries in SavedOptimizerState(checkpoint / "optimizer.safetensors").values():
            assert {tensor.dtype for tensor in entries.values()} == {torch.float32}


def test_a_merge_adds_the_exact_product_to_the_exact_weight(checkpoints: dict[str, Path]):
    adapter = load_file(checkpoints["cycle-2"] / "adapter" / "adapter_model.safetensors")
    module = "model.layers.1.self_attn.o_proj"
    A, B = (adapter[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
    parent, merged = (read_tensor(checkpoints[stage], f"{module}.weight") for stage in ("cycle-1", "cycle-2"))
    assert torch.equal(A, A.bfloat16().float()) and torch.equal(B, B.bfloat16().float())
    torch.testing.assert_close(merged, parent + B @ A, rtol=0, atol=1e-7)  # scaling is 1; |W| is below 0.1
    assert not torch.equal(merged, merged.bfloat16().float())


def test_it_learns_as_autocast_does(checkpoints: dict[str, Path], dataset: Path, tmp_path: Path):
    autocast = run_all(tiny_profile(precision={"dtype": "bfloat16"}), dataset, tmp_path)
    for stage in checkpoints:
        ours, theirs = (manifest_of(made[stage])["evaluation"]["val_loss"] for made in (checkpoints, autocast))
        assert ours == pytest.approx(theirs, rel=0.02)


def test_cutting_full_rank_training_into_stages_changes_no_bit(dataset: Path, tmp_path: Path):
    schedule = {"warm_start_steps": 0, "warmup_steps": 2, "restart_warmup_steps": 0}
    made = [
        run_all(
            tiny_profile(method="full", schedule={**schedule, "cycles": n, "cycle_length": 8 // n}, **PURE),
            dataset,
            tmp_path / str(n),
        )[f"full-{n}"]
        for n in (1, 2)
    ]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


def test_tied_embeddings_are_written_once(dataset: Path, tmp_path: Path):
    profile = tiny_profile(model={"tie_word_embeddings": True}, **PURE)
    output = tmp_path / "warm-start"
    run_stage(stage_request(profile, "warm-start", dataset, output), ignore)
    tensors = load_file(output / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    assert metrics_of(output)[-1]["loss"] < metrics_of(output)[0]["loss"]


def test_tied_matrices_stay_tied():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    model[1].weight = model[0].weight
    round_trained_matrices(model)
    assert model[1].weight is model[0].weight and model[0].weight.dtype == torch.bfloat16
    assert model[1].bias.dtype == torch.float32
