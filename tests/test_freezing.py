"""Low-rank stages train what relora.train says beside A and B, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, family_model
from safetensors.torch import load_file
from stage_runs import ignore, stage_request, tiny_profile
from test_objectives import tiny_vit
from torch.nn import functional as F

from relora_train.cli.plan import vocabulary_note
from relora_train.method.stages import fingerprint_settings, plan_stages
from relora_train.method.wrap import apply_relora, parameter_kinds, unwrap
from relora_train.runs.costs import ParameterKind
from relora_train.runs.plan import plan
from relora_train.settings.profile import Profile, default_run_id, profile_to_read
from relora_train.training.models.chunked_loss import chunked_cross_entropy
from relora_train.training.trainer import run_stage

NARROW = {"target_modules": ("q_proj",)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_has_its_kind(family: str):
    model = family_model(family)
    kinds = parameter_kinds(model)
    assert set(kinds) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, kind in kinds.items():
        own, in_a_block = name.rpartition(".")[2], re.search(r"\.\d+\.", name)
        assert (kind in ("embeddings", "head")) == (not in_a_block and kind != "norms"), name
        assert (kind == "norms") == ("norm" in name or "ln_" in name or ".ln" in name), name
        assert kind != "biases" or own.endswith("bias"), name
        assert kind != "others" or not own.endswith("bias"), name


def test_the_kinds_of_a_vision_transformer_begin_at_its_patches():
    kinds = parameter_kinds(tiny_vit())
    assert {n.partition(".embeddings.")[2] for n, kind in kinds.items() if kind == "embeddings"} == {
        "cls_token", "position_embeddings", "patch_embeddings.projection.weight", "patch_embeddings.projection.bias"
    }  # fmt: skip
    assert {name for name, kind in kinds.items() if kind == "head"} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("relora", "frozen"),
    [
        ({}, set()),
        ({"train": {"embeddings": False, "norms": False}}, {"embeddings", "norms"}),
        ({"train": {"head": False, "others": False}}, {"head", "others"}),
        (NARROW, {"others"}),
        ({**NARROW, "train": {"others": True, "biases": False}}, {"biases"}),
    ],
)
def test_a_stage_moves_what_is_trained_and_nothing_else(
    relora: dict[str, Any], frozen: set[str], dataset: Path, tmp_path: Path
):
    base = tmp_path / "base"
    directory = family_model("llama", vocab_size=300, attention_bias=True)
    directory.save_pretrained(base)
    profile = tiny_profile(
        model={"pretrained": str(base)},
        schedule={"warm_start_steps": 0, "cycles": 1, "cycle_length": 3, "warmup_steps": 0, "restart_warmup_steps": 0},
        relora={"rank": 2, **relora},
        batch={"sequence_length": 16},
    )
    run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), ignore)
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    kinds = parameter_kinds(directory)
    names = [name for name in before if "proj.weight" in name]
    wrapped = {name for name in names if "target_modules" not in relora or "q_proj" in name}
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name not in wrapped and kinds[name] in frozen}
    optimizer = load_file(tmp_path / "out" / "optimizer.safetensors")
    assert not {name for name in still if any(key.startswith(f"{name}.exp_avg") for key in optimizer)}


def test_unwrapping_makes_everything_trainable_again():
    model = family_model("llama")
    apply_relora(model, rank=2, alpha=2, dropout=0, target_modules=None, seed=0, frozen=("embeddings", "norms"))
    assert not model.model.norm.weight.requires_grad
    unwrap(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def settings_of(relora: dict[str, Any]) -> dict[str, Any]:
    profile = Profile.model_validate({"relora": relora})
    found = fingerprint_settings(profile, plan_stages(profile)[1], "data")
    return {key: value for key, value in found.items() if key.startswith("relora.train")}


def test_only_what_is_frozen_enters_a_fingerprint():
    assert settings_of({}) == settings_of({"train": {"others": True}}) == {}
    assert settings_of({**NARROW, "train": {"others": True}}) == {}
    assert settings_of(NARROW) == settings_of({**NARROW, "train": {"others": False}}) == {"relora.train.others": False}
    assert settings_of({"train": {"head": False}}) == {"relora.train.head": False}


def test_a_run_that_trains_all_as_before_keeps_its_name():
    ids = {default_run_id(Profile.model_validate({"relora": {**NARROW, "train": t}})) for t in ({}, {"others": True})}
    assert len(ids) == 1
    assert default_run_id(Profile()) != default_run_id(Profile.model_validate({"relora": {"train": {"head": False}}}))


def test_a_profile_from_before_the_switches_is_read_as_it_trained():
    content = Profile.model_validate({"relora": NARROW}).model_dump(mode="json")
    del content["relora"]["train"]
    assert profile_to_read(json.dumps(content).encode()).relora.frozen == ()
    assert Profile.model_validate(content).relora.frozen == ("others",)


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt_neox", "vit"])
@pytest.mark.parametrize("relora", [{}, NARROW, {"train": {"embeddings": False, "head": False, "norms": False}}])
def test_the_plan_counts_each_kind_as_the_model_has_it(family: str, relora: dict[str, Any], tmp_path: Path):
    model = tiny_vit() if family == "vit" else family_model(family)
    model.config.save_pretrained(tmp_path)
    if family == "gpt_neox" and relora is NARROW:
        relora = {"target_modules": ("query_key_value",)}
    profile = tiny_profile(model={"pretrained": str(tmp_path)}, relora={"rank": 2, **relora})
    cost = plan(profile).low_rank
    apply_relora(
        model, rank=2, alpha=2, dropout=0, target_modules=profile.relora.target_modules, seed=0,
        frozen=profile.relora.frozen,
    )  # fmt: skip
    kinds, counted, trained = parameter_kinds(model), {}, {}
    for name, parameter in model.named_parameters():
        counted[kinds[name]] = counted.get(kinds[name], 0) + parameter.numel()
        trained[kinds[name]] = parameter.requires_grad
    assert {kind.name: kind.parameters for kind in cost.kinds} == counted
    assert {kind.name: kind.trained for kind in cost.kinds} == trained
    assert cost.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def kinds(**numbers: int) -> list[ParameterKind]:
    return [ParameterKind(name=name, parameters=number, trained=True) for name, number in numbers.items()]


def test_a_large_vocabulary_is_told_with_its_switches():
    note = vocabulary_note(kinds(embeddings=600, head=600, norms=1, factors=1200))
    assert note is not None and "50%" in note and "relora.train.embeddings=false, relora.train.head=false" in note
    billion = vocabulary_note(kinds(embeddings=525_000_000, factors=9_000_000_000))
    assert billion is not None and "525M" in billion and "head" not in billion
    assert vocabulary_note(kinds(embeddings=100, head=100, factors=1000)) is None
    assert vocabulary_note(kinds(factors=1000)) is None


def test_a_frozen_head_takes_no_gradient_and_leaves_the_others_bit_for_bit():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 8), torch.randn(30, 8), torch.randint(0, 30, (20,))
    found = []
    for trains in (True, False):
        x, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        loss = chunked_cross_entropy(x, head, None, targets)
        (2 * loss).backward()
        found.append((loss.detach(), x.grad))
        assert (head.grad is not None) == trains
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(found[0][0], expected)
