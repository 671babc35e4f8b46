"""A checkpoint is committed only if its files hold, value by value, what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_runs import ignore, stage_request, tiny_profile
from transformers import MixtralConfig, MixtralForCausalLM

from relora_train.errors import CheckpointCorruptError
from relora_train.runs.workers import run_worker
from relora_train.settings.running import LaunchConfig
from relora_train.training import commit
from relora_train.training.step import StageTraining
from relora_train.training.trainer import run_stage

Change = Callable[[dict[str, torch.Tensor]], Any]

Q_PROJ, EMBEDDING = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"


def last_bit(tensors: dict[str, torch.Tensor], name: str = Q_PROJ) -> None:
    tensors[name].view(-1).view(torch.int32)[-1] ^= 1


def flip_last_bit(path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    last_bit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def after_writing(patch: pytest.MonkeyPatch, change: Change) -> None:
    """What the disk, or transformers, makes of a file between writing and reading it."""
    save = commit.save_model

    def damaging(model: Any, directory: Path, **options: Any) -> None:
        save(model, directory, **options)
        path = directory / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    patch.setattr(commit, "save_model", damaging)


DAMAGES: dict[str, tuple[Change, str]] = {
    "one bit": (last_bit, f"{Q_PROJ} was not read back"),
    "a norm": (lambda tensors: last_bit(tensors, "model.norm.weight"), "model.norm.weight was not read back"),
    "another shape": (lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 16)}), f"{Q_PROJ} was not read back"),
    "half of the digits": (lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].half()}), f"{Q_PROJ} was not"),
    "two exchanged": (
        lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ.replace("q_", "k_")].clone()}),
        f"{Q_PROJ} was not read back",
    ),
    "one missing": (lambda tensors: tensors.pop(Q_PROJ), f"{Q_PROJ} was not written"),
    "no head": (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight was not written"),
    "one more": (lambda tensors: tensors.update(score=torch.zeros(2)), "score was written and is no part of the model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", ["warm-start", "cycle-1"])
def test_a_checkpoint_that_is_not_what_was_trained_is_not_committed(
    damage: str, stage: str, dataset: Path, warm_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    change, said = DAMAGES[damage]
    after_writing(monkeypatch, change)
    schedule = {"warm_start_steps": 6, "cycles": 2, "cycle_length": 4}
    parent = warm_start if stage == "cycle-1" else None
    request = stage_request(tiny_profile(schedule=schedule), stage, dataset, tmp_path / "out", parent)
    with pytest.raises(CheckpointCorruptError, match=said) as error:
        run_stage(request, ignore)
    assert "nothing of this stage was committed" in str(error.value) and not error.value.retryable
    assert not (tmp_path / "out" / "manifest.json").exists()


BF16: dict[str, dict[str, Any]] = {
    "masters": {"precision": {"dtype": "bfloat16"}},
    "pure": {"precision": {"dtype": "pure-bfloat16"}},
    "tied": {"model": {"tie_word_embeddings": True}},
}


@pytest.mark.parametrize("kind", BF16)
def test_the_same_holds_for_rounded_and_tied_tensors(
    kind: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One bit of an embedding, and of a weight whose exact value lies beside the model."""
    profile = tiny_profile(schedule={"warm_start_steps": 0, "cycles": 1, "cycle_length": 3}, **BF16[kind])
    run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "whole"), ignore)
    for name in (EMBEDDING, Q_PROJ):
        with monkeypatch.context() as patch:
            after_writing(patch, lambda tensors, name=name: last_bit(tensors, name))
            with pytest.raises(CheckpointCorruptError, match=f"{name} was not read"):
                run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), ignore)


def test_a_master_that_is_not_the_weight_that_was_trained_is_noticed(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is written as it is: only the rounded weight of the model tells."""
    profile = tiny_profile(
        schedule={"warm_start_steps": 0, "cycles": 1, "cycle_length": 3}, precision={"dtype": "bfloat16"}
    )
    weights = commit.merged_weights

    def exchanged(training: StageTraining) -> dict[str, torch.Tensor]:
        training.masters[Q_PROJ] = training.masters[Q_PROJ.replace("q_", "k_")].clone()
        return weights(training)

    monkeypatch.setattr(commit, "merged_weights", exchanged)
    with pytest.raises(CheckpointCorruptError, match=f"{Q_PROJ} was not read back"):
        run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), ignore)


def test_a_tied_file_whose_config_does_not_say_so_is_not_committed(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its head would be made up by whoever loads it."""
    profile = tiny_profile(model={"tie_word_embeddings": True}, schedule={"warm_start_steps": 3, "cycles": 1})
    save = commit.save_model

    def untying(model: Any, directory: Path, **options: Any) -> None:
        model.config.tie_word_embeddings = False
        save(model, directory, **options)

    monkeypatch.setattr(commit, "save_model", untying)
    with pytest.raises(CheckpointCorruptError, match=r"lm_head\.weight was not written"):
        run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "out"), ignore)


def test_experts_that_files_hold_one_by_one_are_compared_as_they_are_loaded(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    MixtralForCausalLM(
        MixtralConfig(vocab_size=257, num_key_value_heads=2, num_local_experts=2, **sizes)
    ).save_pretrained(tmp_path / "mixtral")
    relora = {"target_modules": ("q_proj", "v_proj")}
    schedule = {"warm_start_steps": 0, "cycles": 1, "cycle_length": 3}
    profile = tiny_profile(model={"pretrained": str(tmp_path / "mixtral")}, relora=relora, schedule=schedule)
    run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "whole"), ignore)
    (expert, *_) = [name for name in load_file(tmp_path / "whole" / "model.safetensors") if "experts.1." in name]
    after_writing(monkeypatch, lambda tensors: last_bit(tensors, expert))
    with pytest.raises(CheckpointCorruptError, match=r"experts\.\w+ was not read back"):
        run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), ignore)


def test_ranks_that_share_a_model_read_back_what_they_wrote(dataset: Path, tmp_path: Path):
    """Each rank's rows of every tensor: the last bit of the last row is another rank's than the first's."""
    profile = tiny_profile(
        schedule={"warm_start_steps": 0, "cycles": 1, "cycle_length": 3},
        launch={"nproc_per_node": 2, "threads": 1, "sharding": "full"},
    )
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with pytest.raises(CheckpointCorruptError, match=f"{Q_PROJ} was not read back"):
            run_worker(
                "damaging_trainer", request, tmp_path / "r.json", on_event=ignore, launch=LaunchConfig(nproc_per_node=2)
            )
    assert not (tmp_path / "out" / "manifest.json").exists()
