"""A wrapped layer that no gradient reaches is found by the tenth update, whoever trains it."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from bypassing_trainer import bypassing_forward
from stage_runs import CPU, ignore, manifest_of, metrics_of, run_all, stage_request, tiny_profile
from test_snapshot import newest
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from relora_train.errors import TrainerInterruptedError, UntrainedLayerError
from relora_train.runs.workers import run_worker
from relora_train.settings.profile import Profile
from relora_train.training import trainer
from relora_train.training.build import prepare_stage
from relora_train.training.progress import CHECKED_UPDATE, check_learning
from relora_train.training.step import StageTraining
from relora_train.training.trainer import run_stage

LONG = {"warm_start_steps": 0, "cycles": 2, "cycle_length": 14, "warmup_steps": 2, "restart_warmup_steps": 2}
NAMES = r"model\.layers\.0\.mlp\.up_proj, model\.layers\.1\.mlp\.up_proj learned nothing in the first 10 updates"


def long_profile(**sections: Any) -> Profile:
    return tiny_profile(schedule=LONG, **sections)


class Updates:
    """The updates that were made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        update = StageTraining.update

        def counted(training: StageTraining, step: int) -> Any:
            self.steps.append(step)
            return update(training, step)

        patch.setattr(StageTraining, "update", counted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "pure-bfloat16"])
def test_a_layer_whose_weight_is_read_past_it_stops_the_stage_at_its_tenth_update(
    dtype: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", bypassing_forward)
    updates = Updates(monkeypatch)
    request = stage_request(long_profile(precision={"dtype": dtype}), "cycle-1", dataset, tmp_path / "out")
    with pytest.raises(UntrainedLayerError, match=NAMES) as error:
        run_stage(request, ignore)
    assert updates.steps == list(range(1, CHECKED_UPDATE + 1)) and not (tmp_path / "out").exists()
    assert "relora.target_modules" in str(error.value) and not error.value.retryable


def test_a_stage_of_fewer_updates_is_looked_at_before_its_merge(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", bypassing_forward)
    profile = tiny_profile(schedule=LONG | {"cycle_length": 4})
    with pytest.raises(UntrainedLayerError, match="in the first 4 updates"):
        run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), ignore)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_any_number_of_ranks_finds_it(sharding: str, dataset: Path, tmp_path: Path):
    profile = long_profile(launch={"nproc_per_node": 2, "threads": 1, "sharding": sharding})
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        with pytest.raises(UntrainedLayerError, match=NAMES):
            run_worker("bypassing_trainer", request, tmp_path / "r.json", on_event=lambda event: None, nproc_per_node=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [7, 12])
def test_a_stage_that_goes_on_from_a_snapshot_is_looked_at_too(
    stop: int, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before the tenth update or after it: what was learned before the snapshot counts, and what was not is found."""
    request = stage_request(long_profile(), "cycle-1", dataset, tmp_path / "out")
    request = request.model_copy(update={"snapshots_directory": tmp_path / "snapshots"})
    with monkeypatch.context() as patch:
        update = StageTraining.update

        def stopping(training: StageTraining, step: int) -> Any:
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(training, step)

        patch.setattr(StageTraining, "update", stopping)
        with pytest.raises(TrainerInterruptedError):
            run_stage(request, ignore)
    resumed = request.model_copy(update={"snapshot_directory": newest(tmp_path / "snapshots")})
    run_stage(resumed.model_copy(update={"output_directory": tmp_path / "whole"}), ignore)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaMLP, "forward", bypassing_forward)
        _forget(patch, "up_proj")
        updates = Updates(patch)
        with pytest.raises(UntrainedLayerError, match=f"up_proj.* in the first {max(stop + 1, 10)} updates"):
            run_stage(resumed, ignore)
    assert updates.steps == list(range(stop + 1, max(stop + 1, 10) + 1))


def _forget(patch: pytest.MonkeyPatch, layer: str) -> None:
    """As if a layer had had no gradient before the snapshot either."""
    restore = trainer.restore_snapshot

    def without(training: StageTraining, directory: Path) -> Any:
        progress = restore(training, directory)
        for name, parameter in training.model.named_parameters():
            if layer in name and "lora_B" in name:
                training.optimizer.state[parameter]["exp_avg"].zero_()
        return progress

    patch.setattr(trainer, "restore_snapshot", without)


@pytest.mark.parametrize("mode", ["zero", "magnitude"])
def test_layers_that_learn_are_never_stopped(mode: str, dataset: Path, tmp_path: Path):
    """Nor after a reset that takes all of Adam's moments."""
    made = run_all(long_profile(optimizer_reset={"mode": mode}), dataset, tmp_path)
    assert manifest_of(made["cycle-2"])["stage"] == "cycle-2" and metrics_of(made["cycle-2"])


class Routed(nn.Module):
    """Experts as modules of their own, of which the last is never chosen."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(config.hidden_size, config.hidden_size)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0]["up_proj"](x) + self.experts[1]["up_proj"](x).tanh()


def test_an_expert_that_no_token_reached_is_a_warning(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(modeling_llama, "LlamaMLP", Routed)
    profile = long_profile(relora={"target_modules": ("q_proj", "up_proj")})
    with caplog.at_level(logging.WARNING, logger="relora_train"):
        run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), ignore)
    (said,) = [record.getMessage() for record in caplog.records if "reached" in record.getMessage()]
    assert "10 updates of cycle-1 reached model.layers.0.mlp.experts.2.up_proj, model.layers.1.mlp.experts.2" in said


def test_experts_of_which_none_learns_are_no_warning(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modeling_llama, "LlamaMLP", Routed)
    monkeypatch.setattr(Routed, "forward", lambda self, x: x * self.experts[0]["up_proj"].bias)
    profile = long_profile(relora={"target_modules": ("q_proj", "up_proj")})
    with pytest.raises(UntrainedLayerError, match=r"experts\.0\.up_proj, .* and 1 more layers learned nothing"):
        run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), ignore)


def test_the_device_is_waited_for_once_a_stage(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a GPU a look at a value in every update would undo what the step saves."""
    training = prepare_stage(stage_request(long_profile(), "cycle-1", dataset, tmp_path / "out"), CPU)
    looks: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: looks.append(tensor) or tolist(tensor))
    for step in range(1, 15):
        training.update(step)
        looks_before = len(looks)
        check_learning(training, step)
        assert len(looks) - looks_before == (step == CHECKED_UPDATE)
