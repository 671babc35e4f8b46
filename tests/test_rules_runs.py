"""Stages under rivals of AdamW: resumed bit for bit, reset by a merge, counted beforehand, and refused where unfit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import CPU, ignore, metrics_of, prepared, run_all, stage_request, tiny_profile
from test_stages import DATASET, fingerprints

from relora_train.errors import ConfigError
from relora_train.runs.model_check import check_settings
from relora_train.runs.plan import plan
from relora_train.settings.load import load_profile
from relora_train.settings.profile import Profile, default_run_id
from relora_train.training.build import prepare_stage
from relora_train.training.files import SavedOptimizerState
from relora_train.training.optimizer import optimizer_state_by_name
from relora_train.training.trainer import run_stage

SUBSPACE: dict[str, Any] = {"subspace_rank": 4, "subspace_steps": 3, "learning_rate": 2e-2}
RIVALS: dict[str, dict[str, Any]] = {
    "fira": {"method": "full", "optimizer": {"kind": "fira", **SUBSPACE}},
    "factored": {"optimizer": {"kind": "factored", "low_rank_state": "factored"}},
}
"""GaLore's state is a part of Fira's."""


def rival(kind: str, **sections: Any) -> Profile:
    return tiny_profile(**RIVALS[kind], snapshots={"every_steps": 4}, **sections)


@pytest.fixture(scope="module", params=RIVALS)
def made(request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind: str = request.param
    return kind, run_all(rival(kind), dataset, tmp_path_factory.mktemp(kind))


def test_a_run_learns_and_a_resumed_stage_gives_the_same_bytes(made: Any, dataset: Path, tmp_path: Path):
    """Resumed after updates 4 of 8: Fira takes new subspaces at updates 2, 5 and 8 of the stage, in the run's count."""
    kind, checkpoints = made
    names = list(checkpoints)
    losses = [record["loss"] for name in names for record in metrics_of(checkpoints[name])]
    assert losses[-1] < losses[0] - 0.1
    request = stage_request(rival(kind), names[-1], dataset, tmp_path / "first", checkpoints[names[-2]])
    run_stage(request.model_copy(update={"snapshots_directory": tmp_path / "snapshots"}), ignore)
    snapshot = sorted((tmp_path / "snapshots").iterdir())[0]
    resumed = request.model_copy(update={"output_directory": tmp_path / "second", "snapshot_directory": snapshot})
    run_stage(resumed, ignore)
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected = (checkpoints[names[-1]] / name).read_bytes()
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() == expected, name


def test_a_checkpoint_holds_the_rivals_state_under_names_of_its_own(made: Any):
    kind, checkpoints = made
    state = SavedOptimizerState(list(checkpoints.values())[-1] / "optimizer.safetensors")
    held = {name: {*entries} for name, entries in state.items()}
    if kind == "fira":
        own = {"step", "subspace", "subspace_avg", "subspace_avg_sq", "residual_norm"}
        assert held["model.layers.0.mlp.up_proj.weight"] == own
        assert held["model.embed_tokens.weight"] == held["model.norm.weight"] == {"step", "exp_avg", "exp_avg_sq"}
        return
    assert held["model.norm.weight"] == {"step", "sq"} and held["model.embed_tokens.weight"] == own_of_matrices()
    for name, entries in state.items():  # the merge emptied A's and B's alone
        assert bool(entries["step"]) == all(bool(value.any()) for value in entries.values()) == ("lora_" not in name)


def own_of_matrices() -> set[str]:
    return {"step", "row_sq", "column_sq"}


@pytest.mark.parametrize("made", ["fira"], indirect=True)
@pytest.mark.parametrize("changed", [{"kind": "galore"}, {"subspace_rank": 5}, {"subspace_steps": 9}])
def test_a_branch_begins_without_state_where_it_holds_another(changed: Any, made: Any, dataset: Path, tmp_path: Path):
    settings = RIVALS["fira"]["optimizer"] | changed
    profile = tiny_profile(method="full", optimizer=settings)
    training = prepare_stage(stage_request(profile, "full-3", dataset, tmp_path / "out", made[1]["full-2"]), CPU)
    state = optimizer_state_by_name(training.optimizer, training.model)
    assert ("model.layers.0.mlp.up_proj.weight" in state) == ("subspace_steps" in changed)
    assert state["model.embed_tokens.weight"]["step"] == 14


@pytest.mark.parametrize(("kind", "low_rank_state"), [
    ("adamw", "adam"), ("adamw", "factored"), ("factored", "adam"), ("factored", "factored"), ("galore", "adam"),
    ("fira", "adam"),
])  # fmt: skip
def test_a_plan_counts_the_state_that_an_optimizer_holds(kind: str, low_rank_state: str, dataset: Path, tmp_path: Path):
    full = kind in ("galore", "fira")
    optimizer = {"kind": kind, "low_rank_state": low_rank_state, **({"subspace_rank": 5} if full else {})}
    sections: dict[str, Any] = {"optimizer": optimizer, "tokenizer": {"vocab_size": 257}}
    sections |= {"method": "full"} if full else {"schedule": {"warm_start_steps": 0}}
    profile = tiny_profile(**sections)
    training = prepare_stage(stage_request(profile, "full-1" if full else "cycle-1", dataset, tmp_path / "out"), CPU)
    training.update(1)
    counted = {True: 0, False: 0}
    for name, entries in optimizer_state_by_name(training.optimizer, training.model).items():
        counted["lora_" in name] += sum(v.numel() for key, v in entries.items() if key not in ("step", "residual_norm"))
    planned = plan(profile)
    cost = planned.full if full else planned.low_rank
    assert cost is not None
    assert (cost.state_of_factors, cost.state_of_others) == (counted[True], counted[False])
    assert cost.memory.optimizer == 4 * sum(counted.values())
    assert cost.snapshot_bytes == 4 * (cost.trainable_parameters + sum(counted.values()))


def test_a_checkpoint_is_planned_without_the_state_that_its_merge_empties():
    low = plan(tiny_profile(tokenizer={"vocab_size": 257}, optimizer={"low_rank_state": "factored"}))
    assert low.low_rank is not None and low.stages[-1].checkpoint is not None
    assert low.stages[-1].checkpoint.optimizer == 4 * low.low_rank.state_of_others
    kept = tiny_profile(
        tokenizer={"vocab_size": 257}, optimizer={"low_rank_state": "factored"}, optimizer_reset={"mode": "none"}
    )
    last = plan(kept).stages[-1].checkpoint
    assert last is not None
    assert last.optimizer == 4 * (low.low_rank.state_of_others + low.low_rank.state_of_factors)


def test_twice_the_rank_with_a_factored_state_takes_the_memory_of_adam():
    """Adam takes 16 bytes a number of A and B, weights and gradients 8 of them; rows and columns next to nothing."""
    adam = plan(load_profile("llama_1b")).low_rank
    factored = plan(load_profile("llama_1b", ["relora.rank=256", "optimizer.low_rank_state=factored"])).low_rank
    assert adam is not None and factored is not None
    assert factored.adapter_parameters == 2 * adam.adapter_parameters
    assert factored.memory.held == pytest.approx(adam.memory.held, rel=1e-3)


@pytest.mark.parametrize(
    "change", [{"subspace_rank": 5}, {"subspace_steps": 4}, {"subspace_scale": 0.5}, {"kind": "galore"}]
)
def test_settings_of_a_subspace_make_another_run(change: dict[str, Any]):
    ours, theirs = rival("fira"), tiny_profile(method="full", optimizer={"kind": "fira", **SUBSPACE, **change})
    assert default_run_id(ours) != default_run_id(theirs)
    assert not {*fingerprints(ours, DATASET).values()} & {*fingerprints(theirs, DATASET).values()}


def test_a_factored_state_of_a_and_b_keeps_the_warm_start():
    ours, theirs = (fingerprints(tiny_profile(optimizer={"low_rank_state": state})) for state in ("adam", "factored"))
    assert [ours[name] == theirs[name] for name in ours] == [True, False, False]


@pytest.mark.parametrize(("sets", "message"), [
    (["optimizer.kind=galore"], "optimizer.kind 'galore' is a rival of low-rank training.*set method to 'full'"),
    (["method=lora", "optimizer.kind=fira"], "optimizer.kind 'fira' is a rival of low-rank training"),
    (["method=full", "optimizer.kind=galore", "launch.sharding=full"], "kind 'galore' goes with whole float32"),
    (["optimizer.kind=factored", "launch.sharding=full"], "optimizer.kind 'factored' goes with whole float32"),
    (["optimizer.low_rank_state=factored", "precision.dtype=pure-bfloat16"], "low_rank_state 'factored' goes with"),
    (["optimizer.kind=factored", "optimizer.state=8bit"], "'8bit' is of AdamW alone"),
    (["optimizer.low_rank_state=factored", "optimizer.state=8bit"], "'8bit' is of AdamW alone"),
    (["optimizer.subspace_rank=4"], "subspace_rank is of kinds 'galore' and 'fira', not of 'adamw'"),
    (["optimizer.kind=factored", "optimizer.subspace_scale=1"], "subspace_scale is of kinds"),
    (["method=full", "optimizer.kind=galore"], "optimizer.subspace_rank 128 exceeds 64, the smallest side of a layer"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_at_the_start(sets: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        load_profile("smoke", sets)
    assert re.search(message, str(refused.value)), refused.value


def test_a_subspace_larger_than_a_pretrained_models_layers_is_refused_before_it_is_loaded(tmp_path: Path):
    import transformers

    transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    sections: dict[str, Any] = {
        "method": "full",
        "optimizer": {"kind": "galore"},
        "model": {"pretrained": str(tmp_path)},
    }
    sections |= {"tokenizer": {"train": True}}
    with pytest.raises(ConfigError, match=r"optimizer\.subspace_rank 128 exceeds the smaller side of"):
        check_settings(Profile.model_validate(sections))


def test_cycles_without_a_gradient_are_told_of_under_a_factored_state_too(dataset: Path, tmp_path: Path):
    """check_learning reads the first of what moments_of gives: it is empty exactly as long as no gradient came."""
    from relora_train.method.layer import lora_parameters
    from relora_train.method.reset import moments_of

    warm = run_all(tiny_profile(schedule={"cycles": 1, "cycle_length": 3}), dataset, tmp_path)["warm-start"]
    training = prepared(warm, dataset, tmp_path / "out", optimizer={"low_rank_state": "factored"})
    for _, factor in lora_parameters(training.model):
        factor.grad = torch.zeros_like(factor)
    training.optimizer.step()
    factors = [factor for _, factor in lora_parameters(training.model)]
    assert not any(bool(moments_of(training.optimizer, factor)[0].any()) for factor in factors)
    training.update(1)
    assert all(bool(moments_of(training.optimizer, factor)[0].any()) for factor in factors if factor.grad.any())
