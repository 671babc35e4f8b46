"""Moments in 8 bits: the updates of bitsandbytes, a state that goes on bit for bit, and one for any optimizer."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from stage_runs import CPU, ignore, run_all, stage_request, tiny_profile
from torch import Tensor, nn

from relora_train.errors import ConfigError
from relora_train.method.eight_bit_adamw import EightBitAdamW
from relora_train.method.reset import reset_optimizer_state
from relora_train.settings.load import load_profile
from relora_train.settings.method import OptimizerConfig
from relora_train.training.build import prepare_stage
from relora_train.training.files import SavedOptimizerState, save_optimizer_state
from relora_train.training.optimizer import build_optimizer, load_optimizer_state_by_name, optimizer_state_by_name
from relora_train.training.trainer import run_stage

EIGHT_BIT = OptimizerConfig(state="8bit", learning_rate=1e-2, weight_decay=0.1)


class Two(nn.Module):
    """One tensor large enough for codes, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.large = nn.Parameter(torch.randn(80, 65, generator=generator))  # 5,200: the last block of 256 is short
        self.small = nn.Parameter(torch.randn(7, generator=generator))


def step(model: Two, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for parameter in (model.large, model.small):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10 ** (number % 3 - 1)
    optimizer.step()


def optimizer_of(model: nn.Module) -> EightBitAdamW:
    optimizer = build_optimizer(model, EIGHT_BIT)
    assert isinstance(optimizer, EightBitAdamW)
    return optimizer


def test_updates_are_those_of_bitsandbytes_bit_for_bit():
    ours, theirs = Two(), Two()
    numbers: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    groups = [{"params": [theirs.large], "weight_decay": 0.1}, {"params": [theirs.small], "weight_decay": 0.0}]
    optimizer, reference = optimizer_of(ours), AdamW8bit(groups, **numbers)  # type: ignore[no-untyped-call]
    for number in range(6):
        step(ours, optimizer, number)
        step(theirs, reference, number)
        assert torch.equal(ours.large, theirs.large) and torch.equal(ours.small, theirs.small), number
    state = optimizer.state[ours.large]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    assert optimizer.state[ours.small]["exp_avg"].dtype == torch.float32


def test_the_state_of_a_checkpoint_is_float32_and_near_that_of_adamw():
    ours, exact = Two(), Two()
    optimizer, plain = optimizer_of(ours), build_optimizer(exact, EIGHT_BIT.model_copy(update={"state": "float32"}))
    for number in range(4):
        step(ours, optimizer, number)
        step(exact, plain, number)
    found, expected = (optimizer_state_by_name(o, m) for o, m in ((optimizer, ours), (plain, exact)))
    for name, moments in found.items():
        assert moments.keys() == expected[name].keys() and float(moments["step"]) == 4
        for key in ("exp_avg", "exp_avg_sq"):
            error = (moments[key] - expected[name][key]).norm() / expected[name][key].norm()
            assert moments[key].dtype == torch.float32 and error < 0.03, (name, key)
    assert (ours.large - exact.large).norm() < 0.02 * exact.large.norm()


def test_the_state_as_it_is_held_goes_on_bit_for_bit_and_so_does_a_float32_one_from_anywhere():
    model = Two()
    optimizer = optimizer_of(model)
    for number in range(3):
        step(model, optimizer, number)
    held = copy.deepcopy(optimizer_state_by_name(optimizer, model, as_held=True))
    twin = Two()
    twin.load_state_dict(model.state_dict())
    again = optimizer_of(twin)
    load_optimizer_state_by_name(again, twin, held)
    for number in range(3, 6):
        step(model, optimizer, number)
        step(twin, again, number)
    assert torch.equal(model.large, twin.large) and torch.equal(model.small, twin.small)

    plain = build_optimizer(twin, EIGHT_BIT.model_copy(update={"state": "float32"}))
    load_optimizer_state_by_name(plain, twin, optimizer_state_by_name(again, twin))
    assert torch.equal(plain.state[twin.large]["exp_avg"], again.read(twin.large)[0])
    load_optimizer_state_by_name(again, twin, optimizer_state_by_name(plain, twin))
    assert again.state[twin.large]["exp_avg"].dtype == torch.uint8 and float(again.state[twin.large]["step"]) == 6


@pytest.mark.parametrize("mode", ["zero", "magnitude", "random"])
def test_a_reset_empties_what_it_says(mode: Any):
    model = Two()
    optimizer = optimizer_of(model)
    step(model, optimizer, 0)
    before = optimizer.read(model.large)
    report = reset_optimizer_state(optimizer, [("large", model.large)], mode=mode, ratio=0.9)
    after = optimizer.read(model.large)
    zero = after[0] == 0
    assert report.share_zeroed == pytest.approx(1 if mode == "zero" else 0.9, abs=0.02)
    assert float(zero.float().mean()) == pytest.approx(report.share_zeroed, abs=0.02)
    kept: Tensor = ~zero
    torch.testing.assert_close(after[0][kept], before[0][kept], rtol=0.1, atol=0.01)


@pytest.fixture(scope="module")
def made(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_all(tiny_profile(**SETTINGS), dataset, tmp_path_factory.mktemp("run"))


SETTINGS: dict[str, Any] = {
    "optimizer": {"state": "8bit"},
    "precision": {"frozen": "int8"},
    "snapshots": {"every_steps": 3},
}


def test_a_run_learns_and_hands_on_a_state_that_any_optimizer_takes(made: dict[str, Path]):
    state = SavedOptimizerState(made["cycle-1"] / "optimizer.safetensors")
    assert {tensor.dtype for name in state for tensor in state[name].values()} == {torch.float32}
    assert "model.embed_tokens.weight" in state


def test_a_stage_resumed_from_its_snapshot_gives_the_same_bytes(made: dict[str, Path], dataset: Path, tmp_path: Path):
    profile = tiny_profile(**SETTINGS)
    request = stage_request(profile, "cycle-2", dataset, tmp_path / "first", made["cycle-1"])
    request = request.model_copy(update={"snapshots_directory": tmp_path / "snapshots"})
    run_stage(request, ignore)
    snapshot = sorted((tmp_path / "snapshots").iterdir())[0]
    resumed = request.model_copy(update={"output_directory": tmp_path / "second", "snapshot_directory": snapshot})
    run_stage(resumed, ignore)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (made["cycle-2"] / name).read_bytes()
    training = prepare_stage(request, CPU)
    assert isinstance(training.optimizer, EightBitAdamW)
    save_optimizer_state(optimizer_state_by_name(training.optimizer, training.model), tmp_path / "o.safetensors")


@pytest.mark.parametrize("other", ["launch.sharding=full", "precision.dtype=pure-bfloat16"])
def test_what_it_cannot_do_is_refused(other: str):
    with pytest.raises(ConfigError, match=r"8bit.*whole float32"):
        load_profile("smoke", ["optimizer.state=8bit", other])


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "relora_train.method.eight_bit_adamw")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'relora-train\[bitsandbytes\]'"):
        build_optimizer(Two(), EIGHT_BIT)
