"""A wrapped layer that no gradient reaches is found by the tenth update, whoever trains it."""

import hashlib
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bypassing_trainer import bypassing_forward
from stage_runs import CPU, ignore, manifest_of, metrics_of, prepared, run_all, stage_request, tiny_profile
from test_snapshot import newest
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from relora_train.distributed import Ranks
from relora_train.errors import CorpusTooSmallError, TrainerInterruptedError, UntrainedLayerError
from relora_train.runs.workers import run_worker
from relora_train.settings.profile import Profile
from relora_train.settings.running import LaunchConfig
from relora_train.training import build as module
from relora_train.training import trainer
from relora_train.training.build import prepare_stage
from relora_train.training.files import MasterWeights
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
            run_worker(
                "bypassing_trainer",
                request,
                tmp_path / "r.json",
                on_event=ignore,
                launch=LaunchConfig(nproc_per_node=2),
            )
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


ENTRIES = 10_000_000
"""40 MB a weight: what is smaller the C library keeps for itself when it is freed."""


def test_dropout_is_drawn_as_in_the_runs_that_were_made_before(warm_start: Path, dataset: Path, tmp_path: Path):
    """Another seed would be as random, but a run of yesterday would go on with other bits."""
    training = prepared(warm_start, dataset, tmp_path, seed=5, batch={"micro_sequences": 4})
    training.update(9)
    digest = hashlib.blake2b(b"5/9/1/0", digest_size=8).digest()  # seed, step, second and last micro-step, rank
    assert torch.initial_seed() == int.from_bytes(digest, "little") >> 1


def test_the_optimizer_has_the_settings_of_its_profile(warm_start: Path, dataset: Path, tmp_path: Path):
    optimizer = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    training = prepared(warm_start, dataset, tmp_path, optimizer=optimizer)
    for group in training.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0)
    assert training.model.training, "with its dropout"


def test_a_corpus_that_is_too_small_is_refused_before_a_model_is_made(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def made(*arguments: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(module, "_whole_model", made)
    request = stage_request(tiny_profile(batch={"sequences": 100_000}), "warm-start", dataset, tmp_path)
    with pytest.raises(CorpusTooSmallError, match="100,000 are needed"):
        prepare_stage(request, CPU)


def test_master_weights_are_the_parents_until_they_are_written(tmp_path: Path):
    read: list[str] = []
    parent: Mapping[str, torch.Tensor] = {name: torch.full((2,), float(i)) for i, name in enumerate("ba")}
    masters = MasterWeights(list(parent), lambda name: read.append(name) or parent[name], tmp_path)
    assert (list(masters), len(masters), "c" in masters) == (["a", "b"], 2, False)
    masters["a"] = torch.tensor([7.0, 7.0])
    assert {name: masters[name].tolist() for name in masters} == {"a": [7.0, 7.0], "b": [0.0, 0.0]}
    assert read == ["b"]
    with pytest.raises(KeyError, match="c"):
        masters["c"]
    with pytest.raises(TypeError, match="cannot be removed"):
        del masters["a"]


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_merged_weights_are_read_back_bit_for_bit_and_take_no_memory(tmp_path: Path):
    names = [str(number) for number in range(6)]
    drawn = torch.randn(1000, ENTRIES // 1000)
    masters = MasterWeights(names, lambda name: drawn + int(name), tmp_path)
    before = own_bytes()  # with the one that all are made from
    for name in names:
        weight = masters[name]
        masters[name] = weight.mul_(2)
        del weight
    assert own_bytes() - before < 4 * ENTRIES, "of six weights not one is held"
    assert all(torch.equal(masters[name], (drawn + int(name)) * 2) for name in names)
    assert not list(tmp_path.iterdir())


def test_only_the_rank_that_writes_keeps_merged_weights(warm_start: Path, dataset: Path, tmp_path: Path):
    request = stage_request(tiny_profile(precision={"dtype": "bfloat16"}), "cycle-1", dataset, tmp_path, warm_start)
    for rank in (0, 1):
        masters = prepare_stage(request, Ranks(rank=rank, world_size=2, device=torch.device("cpu"))).masters
        assert masters is not None
        name = next(iter(masters))
        masters[name] = torch.zeros_like(masters[name])
        assert bool(masters[name].any()) == (rank == 1)


def test_a_rank_without_rows_and_a_machine_without_the_directory_have_theirs_too(tmp_path: Path):
    masters = MasterWeights(["a", "b"], lambda name: torch.ones(3), tmp_path / "elsewhere")
    masters["a"], masters["b"] = torch.empty(0, 4), torch.tensor([[1.0, float("nan")]])
    others = MasterWeights(["a"], lambda name: torch.ones(3), tmp_path, keeps=False)
    others["a"] = torch.zeros(3)  # the first rank writes it, and it alone needs the disk
    assert others["a"].tolist() == [1, 1, 1] and not list(tmp_path.iterdir())
    assert masters["a"].shape == (0, 4) and masters["b"].shape == (1, 2) and masters["b"].isnan().any()
