"""The trainer takes images as it takes text: what holds for one objective holds for the other."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import ignore, manifest_of, metrics_of, run_all, stage_request
from test_ranks import by_two_ranks
from test_snapshot import run_with_stops
from tiny_images import tiny_digits, write_digits
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from relora_train.data.dataset import ImageDataset
from relora_train.errors import ConfigError, NoTargetModulesError
from relora_train.method.fast_path import share_inputs
from relora_train.method.layer import relora_layers
from relora_train.method.merge import merge_and_reinit
from relora_train.method.stages import fingerprint_settings, plan_stages, stage_fingerprint, stages_after
from relora_train.method.wrap import apply_relora
from relora_train.runs.plan import plan
from relora_train.runs.retraining.interface import RetrainOptions
from relora_train.runs.retraining.retrain import plan_retrain
from relora_train.settings.load import load_profile
from relora_train.settings.objectives import OBJECTIVES, measures_in
from relora_train.settings.profile import Profile, default_run_id
from relora_train.storage.memory import MemoryStore
from relora_train.training.models.registry import model_shape, objective_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def checkpoints(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_all(tiny_digits(), dataset, tmp_path_factory.mktemp("run"))


# --- settings


def fingerprint(profile: Profile) -> str:
    return stage_fingerprint(fingerprint_settings(profile, plan_stages(profile)[-1], "d" * 64), None)


IMAGE_CHANGES = [
    {"images": {"channels": 3}},
    {"images": {"classes": 9}},
    {"images": {"patch_size": 1}, "batch": {"sequence_length": 64}},
    {"images": {"size": 16, "patch_size": 4}},
]


@pytest.mark.parametrize("changes", IMAGE_CHANGES)
def test_what_images_are_is_part_of_the_names_of_an_image_run(changes: dict[str, Any]):
    ours, theirs = tiny_digits(), tiny_digits(**changes)
    assert fingerprint(ours) != fingerprint(theirs) and default_run_id(ours) != default_run_id(theirs)


def test_what_images_are_is_part_of_no_name_of_a_text_run():
    text = Profile()
    other = Profile.model_validate({"images": {"size": 28, "classes": 9, "patch_size": 4}})
    assert fingerprint(text) == fingerprint(other) and default_run_id(text) == default_run_id(other)
    assert not any("objective" in key for key in fingerprint_settings(text, plan_stages(text)[-1], "d" * 64))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"batch": {"sequence_length": 64}}, "batch.sequence_length 64 is not 16, the patches of 2 x 2 pixels"),
        ({"images": {"patch_size": 3}}, "size 8 is not a multiple of patch_size 3"),
        (
            {"data": {"source": "python-stdlib"}},
            "does not learn from data.source 'python-stdlib'; it takes digits, idx",
        ),
        ({"objective": "causal_lm"}, "objective 'causal_lm' does not learn from data.source 'digits'"),
        ({"evaluation": {"sample_prompts": ["def "]}}, "sample_prompts are continued by objective 'causal_lm' only"),
        ({"relora": {"rank": 33}}, "relora.rank 33 exceeds 32"),
    ],
)
def test_sections_that_do_not_fit_the_objective_are_refused(sections: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        tiny_digits(**sections)


def test_images_and_text_have_sources_of_their_own_and_scores_tell_the_objective():
    images = {*OBJECTIVES["image_classification"].sources}
    assert all(images.isdisjoint(e.sources) for name, e in OBJECTIVES.items() if name != "image_classification")
    for entry in OBJECTIVES.values():
        scores = {"val_loss": 1.0, entry.headline.key: 1.0, entry.second.key: 1.0}
        assert measures_in(scores) == measures_in({**scores, entry.scored: 9}) == entry
    assert measures_in({"val_loss": 1.0}) == OBJECTIVES["causal_lm"]


def test_a_checkpoint_of_text_is_not_continued_with_images_nor_the_other_way_round(
    checkpoints: dict[str, Path], dataset: Path
):
    from relora_train.checkpoints.manifest import CheckpointManifest

    parent = CheckpointManifest.model_validate(manifest_of(checkpoints["cycle-1"]))
    assert [stage.name for stage in stages_after(tiny_digits(), parent)] == ["cycle-2"]
    with pytest.raises(ConfigError, match="objective: image_classification -> causal_lm"):
        stages_after(Profile(), parent)
    with pytest.raises(ConfigError, match=r"images.classes: 10 -> 9"):
        stages_after(tiny_digits(images={"classes": 9}), parent)


def test_a_series_of_images_is_refused():
    with pytest.raises(ConfigError, match="a series goes on with new documents"):
        plan_retrain(MemoryStore(), "digits", tiny_digits(), RetrainOptions())


# --- the model


def tiny_vit(*, seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():  # transformers starts biases at zero, where a forgotten one would not be seen
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def wrapped_vit(*, dropout: float = 0.0) -> nn.Module:
    """With low-rank updates that are not zero."""
    model = tiny_vit()
    apply_relora(model, rank=4, alpha=8, dropout=dropout, target_modules=None, seed=0)
    with torch.no_grad():
        for _, layer in relora_layers(model):
            layer.lora_B.normal_(0, 0.1)
    return model


def images(number: int = 6) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def outcome(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss on them."""
    model.zero_grad(set_to_none=True)
    logits = model(pixel_values=images()).logits
    nn.functional.cross_entropy(logits, torch.arange(6)).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_attention_and_mlp_of_a_vit_are_wrapped_and_its_classifier_never():
    model = wrapped_vit()
    names = [name for name, _ in relora_layers(model)]
    assert len(names) == 2 * 6 and not any("classifier" in name for name in names)
    with pytest.raises(NoTargetModulesError):
        apply_relora(tiny_vit(), rank=4, alpha=8, dropout=0.0, target_modules=["classifier"], seed=0)


def test_a_merge_leaves_the_logits_and_the_biases_of_a_vit_as_they_were():
    model = wrapped_vit().eval()
    before = model(pixel_values=images()).logits.detach()
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    merge_and_reinit(model, cycle=1, seed=0)
    torch.testing.assert_close(model(pixel_values=images()).logits, before, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(dict(model.named_parameters())[name], bias) for name, bias in biases.items())


def test_the_fast_path_gives_a_vit_the_reference_s_logits_and_gradients():
    model = wrapped_vit()
    shared = copy.deepcopy(model)
    share_inputs(shared, optimizer=torch.optim.SGD(shared.parameters(), lr=0.1))
    expected_logits, expected = outcome(model)
    logits, gradients = outcome(shared)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys() and any(name.endswith("q_proj.bias") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    for _, layer in relora_layers(shared):
        layer.shared = None
    torch.testing.assert_close(outcome(shared)[0], expected_logits, rtol=0, atol=0)


def test_a_plan_counts_the_model_that_is_trained(checkpoints: dict[str, Path]):
    profile = tiny_digits()
    planned, model = plan(profile), tiny_vit()
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    apply_relora(model, rank=4, alpha=8, dropout=0.0, target_modules=None, seed=0)
    assert planned.low_rank is not None
    assert planned.low_rank.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    vectors = sum(p.numel() for p in tiny_vit().parameters() if p.ndim == 1)
    assert model_shape(profile).vector_parameters == vectors
    continued = tiny_digits(model={"pretrained": str(checkpoints["cycle-2"])})
    assert model_shape(continued) == model_shape(profile)


def test_the_flops_of_a_plan_are_the_counted_ones():
    """Counted by torch over one forward and backward pass of eager attention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_vit()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        outcome(model)
    planned = plan(tiny_digits(method="full"))
    assert planned.full is not None
    assert planned.full.flops_per_token * 6 * 16 == pytest.approx(counter.get_total_flops(), rel=0.02)


# --- training


def test_training_beats_chance_by_far_and_every_stage_lowers_the_loss(checkpoints: dict[str, Path]):
    scores = [manifest_of(checkpoint)["evaluation"] for checkpoint in checkpoints.values()]
    assert scores[0]["val_loss_before"] == pytest.approx(math.log(10), abs=0.2)
    assert scores[0]["val_accuracy_before"] < 0.3
    assert all(score["val_loss"] < score["val_loss_before"] for score in scores)
    assert scores[-1]["val_accuracy"] > 0.6
    assert scores[-1]["val_images"] == manifest_of(checkpoints["cycle-2"])["evaluation"]["val_images"] > 400


def test_merges_change_nothing_and_the_low_rank_gradients_live(checkpoints: dict[str, Path]):
    for name in ("cycle-1", "cycle-2"):
        report = manifest_of(checkpoints[name])["merge_report"]
        assert report["max_relative_output_change"] < 1e-5
        assert report["relative_update_norm"] > 1e-3
        assert report["first_lora_A_grad_norm"] > 0 and report["first_lora_B_grad_norm"] > 0
        assert len(report["layers"]) == 12


def test_plain_from_pretrained_gives_the_scores_the_trainer_measured(checkpoints: dict[str, Path], dataset: Path):
    checkpoint = checkpoints["cycle-2"]
    assert (checkpoint / "preprocessor_config.json").is_file()
    model = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    data = ImageDataset(dataset, "val")
    rows = torch.from_numpy(data.read_blocks(0, data.blocks))
    function = objective_of(tiny_digits()).loss_function(model, data.manifest)
    with torch.no_grad():
        logits, classes = function.logits(rows), rows[:, -1].long()
    expected = manifest_of(checkpoint)["evaluation"]
    assert float((logits.argmax(-1) == classes).float().mean()) == pytest.approx(expected["val_accuracy"])
    assert float(nn.functional.cross_entropy(logits, classes)) == pytest.approx(expected["val_loss"], rel=1e-5)


def test_tokens_are_patches(checkpoints: dict[str, Path]):
    assert [record["tokens_seen"] for record in metrics_of(checkpoints["cycle-2"])][-1] == 240 * 32 * 16
    assert manifest_of(checkpoints["cycle-2"])["tokens_seen"] == 240 * 32 * 16


def test_micro_batches_give_the_same_update(dataset: Path, tmp_path: Path):
    """Up to the order of sums: one forward pass of 32 images, or four of 8."""
    losses = []
    for micro in (None, 8):
        profile = tiny_digits(batch={"micro_sequences": micro}, schedule={"warm_start_steps": 5})
        out = tmp_path / str(micro)
        run_stage_of(profile, "warm-start", dataset, out)
        losses.append([record["loss"] for record in metrics_of(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def run_stage_of(profile: Profile, stage: str, dataset: Path, out: Path, parent: Path | None = None) -> None:
    from relora_train.training.trainer import run_stage

    run_stage(stage_request(profile, stage, dataset, out, parent), ignore)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(dataset: Path, tmp_path: Path, precision: str):
    profile = tiny_digits(
        relora={"dropout": 0.2},
        precision={"dtype": precision},
        schedule={"warm_start_steps": 4, "cycles": 1, "cycle_length": 8, "warmup_steps": 2, "restart_warmup_steps": 1},
    )
    run_stage_of(profile, "warm-start", dataset, tmp_path / "warm")
    run_stage_of(profile, "cycle-1", dataset, tmp_path / "whole", tmp_path / "warm")
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "stopped", tmp_path / "warm")
    run_with_stops(request, [6, 9], tmp_path / "snapshots")
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


@pytest.mark.parametrize("sharding", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_two_ranks_train_the_one_model(dataset: Path, tmp_path: Path, sharding: str):
    launch = {"nproc_per_node": 2, "threads": 1, "sharding": sharding}
    schedule = {"warm_start_steps": 0, "cycles": 1, "cycle_length": 6, "warmup_steps": 2, "restart_warmup_steps": 1}
    alone, shared = tiny_digits(schedule=schedule), tiny_digits(schedule=schedule, launch=launch)
    run_stage_of(alone, "cycle-1", dataset, tmp_path / "alone" / "out")
    (tmp_path / "shared").mkdir()
    by_two_ranks(stage_request(shared, "cycle-1", dataset, tmp_path / "shared" / "out"))
    one, other = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("alone", "shared"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():  # Adam's steps are as long for a tiny gradient as for a large one
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_the_shipped_profile_of_fashion_mnist_cuts_it_into_its_patches():
    profile = load_profile("fashion")
    assert profile.images.patches == profile.batch.sequence_length == 49
