"""What a stage guarantees: from one complete checkpoint to the next, the same bits every time."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from stage_runs import CPU, drawn_factor, ignore, manifest_of, metrics_of, run_all, seed_of, stage_request, tiny_profile
from tiny_data import DATASET_ID, VOCABULARY
from tiny_models import tiny_gpt_neox
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from relora_train.checkpoints.manifest import describe_files, hash_file
from relora_train.data.dataset import TokenDataset
from relora_train.errors import DivergedError, SequenceTooLongError, TrainingError, VocabularyMismatchError
from relora_train.method.layer import relora_layers
from relora_train.method.merge import merge_and_reinit
from relora_train.method.schedule import learning_rate
from relora_train.method.stages import plan_stages
from relora_train.settings.running import PrecisionConfig
from relora_train.training import evaluate
from relora_train.training.build import prepare_stage
from relora_train.training.end_of_cycle import relative_change
from relora_train.training.evaluate import evaluate_checkpoint, evaluate_model, hold_as_computed
from relora_train.training.files import SavedOptimizerState, read_tensor
from relora_train.training.models.model import next_token_loss
from relora_train.training.models.pretrained import load_model
from relora_train.training.models.registry import objective_of
from relora_train.training.requests import EvaluationRequest
from relora_train.training.step import draw_seed
from relora_train.training.trainer import run_stage


@pytest.fixture(scope="module")
def checkpoints(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_all(tiny_profile(), dataset, tmp_path_factory.mktemp("run"))


def test_every_stage_lowers_the_validation_loss(checkpoints: dict[str, Path]):
    for checkpoint in checkpoints.values():
        scores = manifest_of(checkpoint)["evaluation"]
        assert scores["val_loss"] < scores["val_loss_before"]


def test_the_manifest_lists_every_file_with_its_true_digest(checkpoints: dict[str, Path]):
    for checkpoint in checkpoints.values():
        listed = {entry["path"]: entry["sha256"] for entry in manifest_of(checkpoint)["files"]}
        assert listed == {entry.path: hash_file(checkpoint / entry.path) for entry in describe_files(checkpoint)}
        assert {"model.safetensors", "config.json", "tokenizer.json", "optimizer.safetensors"} <= listed.keys()
        assert {"training_state.json", "metrics.jsonl", "profile.json"} <= listed.keys()


def test_plain_from_pretrained_gives_the_loss_the_trainer_measured(checkpoints: dict[str, Path], dataset: Path):
    """Fault B9: the official code's checkpoints lose the low-rank update here."""
    objective = objective_of(tiny_profile(evaluation={"batch_sequences": 5}))
    model = AutoModelForCausalLM.from_pretrained(checkpoints["cycle-2"])
    val_data = objective.open_data(dataset, "val")
    loss_function = objective.loss_function(model, val_data.manifest)
    evaluation = evaluate_model(model, loss_function, val_data, objective, CPU, sequences=16)
    expected = manifest_of(checkpoints["cycle-2"])["evaluation"]["val_loss"]
    assert math.isclose(evaluation.val_loss, expected, rel_tol=1e-6)  # float32 sums in another order
    assert AutoTokenizer.from_pretrained(checkpoints["cycle-2"]).decode([65, 66])


def test_an_evaluation_in_bfloat16_holds_half_the_bytes_and_scores_the_same(
    checkpoints: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Autocast rounds the weights of linear layers for each product; they can as well be held so."""
    prompts = {"sample_prompts": ("ab",), "sample_tokens": 4}
    profile = tiny_profile(precision={"dtype": "bfloat16"}, evaluation={"sequences": 16, **prompts})
    kept: list[nn.Module] = []

    def watched(model: nn.Module, precision: PrecisionConfig) -> None:
        hold_as_computed(model, precision)
        kept.append(model)

    monkeypatch.setattr(evaluate, "hold_as_computed", watched)
    request = EvaluationRequest(
        profile=profile,
        checkpoint_directory=checkpoints["cycle-2"],
        dataset_directory=dataset,
        result_path=tmp_path / "scores.json",
        sequences=16,
    )
    evaluate.evaluate_checkpoint(request, ignore)
    record = json.loads((tmp_path / "scores.json").read_text())
    dtypes = {name.split(".")[-2]: parameter.dtype for name, parameter in kept[0].named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    objective = objective_of(profile)
    model = AutoModelForCausalLM.from_pretrained(checkpoints["cycle-2"])
    val_data = objective.open_data(dataset, "val")
    loss_function = objective.loss_function(model, val_data.manifest)
    exact = evaluate_model(model, loss_function, val_data, objective, CPU, sequences=16)
    assert record["val_loss"] == exact.val_loss and record["samples"][0]["prompt"] == "ab"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_the_adapter_of_a_cycle_added_to_its_parent_gives_the_merged_weights(checkpoints: dict[str, Path]):
    parent = AutoModelForCausalLM.from_pretrained(checkpoints["cycle-1"])
    adapted = PeftModel.from_pretrained(parent, str(checkpoints["cycle-2"] / "adapter")).merge_and_unload()
    merged = load_file(checkpoints["cycle-2"] / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(adapted.state_dict()[name], merged[name], rtol=1e-5, atol=1e-6)


def test_two_runs_give_the_same_bytes(checkpoints: dict[str, Path], dataset: Path, tmp_path: Path):
    again = run_all(tiny_profile(), dataset, tmp_path)
    for stage, checkpoint in checkpoints.items():
        for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
            assert (checkpoint / name).read_bytes() == (again[stage] / name).read_bytes(), (stage, name)


def test_the_low_rank_gradients_are_alive_by_the_second_step_of_every_cycle(checkpoints: dict[str, Path]):
    """Fault B1: with A and B both zero no gradient reaches either. While B = 0 the gradient of A is zero; as the first
    update after a merge runs at learning rate zero, A follows in the third."""
    for stage, start in (("cycle-1", 6), ("cycle-2", 14)):
        by_step = {record["step"]: record for record in metrics_of(checkpoints[stage])}
        assert by_step[start + 1]["learning_rate"] == 0
        assert by_step[start + 1]["lora_B_grad_norm"] > 0
        assert by_step[start + 2]["lora_B_grad_norm"] > 0
        assert by_step[start + 3]["lora_A_grad_norm"] > 0


@pytest.mark.parametrize("seed", [0, 3])
def test_every_cycle_begins_with_a_factor_of_its_own(
    checkpoints: dict[str, Path], dataset: Path, tmp_path: Path, seed: int
):
    """The heart of the method: with the same A again, every cycle would search the same subspace."""
    profile = tiny_profile(seed=seed)
    for cycle, parent in ((1, "warm-start"), (2, "cycle-1")):
        request = stage_request(profile, f"cycle-{cycle}", dataset, tmp_path / str(cycle), checkpoints[parent])
        layers = dict(relora_layers(prepare_stage(request, CPU).model))
        assert len(layers) == 2 * 7
        for name, layer in layers.items():
            torch.testing.assert_close(
                layer.lora_A.data, drawn_factor(name, layer.lora_A.shape, cycle=cycle, seed=seed)
            )
            assert layer.lora_B.count_nonzero() == 0


def test_the_logged_learning_rate_is_the_schedules_and_dips_where_the_merges_are(checkpoints: dict[str, Path]):
    """Fault B5: merges and restarts fell out of step."""
    profile = tiny_profile()
    for stage in plan_stages(profile):
        for record in metrics_of(checkpoints[stage.name]):
            assert record["learning_rate"] == learning_rate(profile, stage, record["step"])
        if stage.low_rank:
            assert metrics_of(checkpoints[stage.name])[0]["learning_rate"] == 0
            assert metrics_of(checkpoints[stage.name], "merge")[0]["step"] == stage.end_step


def test_merging_changed_the_output_by_rounding_only(checkpoints: dict[str, Path]):
    for stage in ("cycle-1", "cycle-2"):
        report = manifest_of(checkpoints[stage])["merge_report"]
        assert report["max_relative_output_change"] < 1e-5
        assert len(report["layers"]) == 2 * 7
        assert all(layer["update_norm"] > 0 for layer in report["layers"].values())


def test_the_total_update_has_a_higher_rank_than_one_cycle(checkpoints: dict[str, Path]):
    name = "model.layers.0.mlp.gate_proj.weight"
    warm, first, last = (
        load_file(checkpoints[stage] / "model.safetensors")[name].double().numpy()
        for stage in ("warm-start", "cycle-1", "cycle-2")
    )
    rank = tiny_profile().relora.rank

    def count(delta: np.ndarray) -> int:  # rounding of W in float32 leaves 1e-7 of |W| behind
        return int((np.linalg.svd(delta, compute_uv=False) > 1e-5).sum())

    assert count(first - warm) == count(last - first) == rank
    assert count(last - warm) == 2 * rank


def test_the_optimizer_state_is_pruned_and_small(checkpoints: dict[str, Path]):
    zeroed = manifest_of(checkpoints["cycle-1"])["merge_report"]["optimizer_state_zeroed"]
    assert 0.96 < zeroed < 0.99  # 0.99 of tensors of 128 and 192 entries, rounded down
    state = SavedOptimizerState(checkpoints["cycle-1"] / "optimizer.safetensors")
    moments = state["model.layers.0.self_attn.q_proj.lora_B"]
    assert torch.equal(moments["exp_avg"] != 0, moments["exp_avg_sq"] != 0)  # fault B2: one mask for both
    assert state["model.embed_tokens.weight"]["exp_avg"].count_nonzero() > 0


def test_a_random_reset_keeps_what_is_drawn_from_seed_cycle_and_name(
    checkpoints: dict[str, Path], dataset: Path, tmp_path: Path
):
    """Not the same entries in every cycle, or in every run: those would keep their moments for ever."""
    profile = tiny_profile(seed=3, optimizer_reset={"mode": "random", "ratio": 0.5})
    for cycle, parent in ((1, "warm-start"), (2, "cycle-1")):
        run_stage(stage_request(profile, f"cycle-{cycle}", dataset, tmp_path / str(cycle), checkpoints[parent]), ignore)
        state = SavedOptimizerState(tmp_path / str(cycle) / "optimizer.safetensors")
        for name in ("model.layers.0.self_attn.q_proj.lora_B", "model.layers.1.mlp.up_proj.lora_A"):
            generator = torch.Generator().manual_seed(seed_of(3, cycle, name))
            kept = torch.rand(state[name]["exp_avg"].shape, generator=generator) > 0.5
            assert torch.equal(state[name]["exp_avg"] != 0, kept), (cycle, name)


@pytest.mark.parametrize("harm", [2.0, float("nan")])
def test_a_merge_after_which_the_model_computes_something_else_is_not_committed(
    checkpoints: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: float
):
    from relora_train.training import end_of_cycle as merging

    def harmful(model: torch.nn.Module, **options: Any) -> Any:
        report = merge_and_reinit(model, **options)
        next(layer for _, layer in relora_layers(model)).weight.data[0, 0] *= 100 * harm
        return report

    monkeypatch.setattr(merging, "merge_and_reinit", harmful)
    request = stage_request(tiny_profile(), "cycle-1", dataset, tmp_path / "out", checkpoints["warm-start"])
    with pytest.raises(TrainingError, match="changed the model's output by"):
        run_stage(request, ignore)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_change_of_an_output_is_that_of_the_logit_that_changed_most():
    before = torch.linspace(-4, 2, 1000)
    after = before.clone()
    after[7] += 2
    assert relative_change(before, after) == 0.5


def test_on_another_dataset_the_data_begin_at_their_beginning_and_tokens_are_counted_on(
    checkpoints: dict[str, Path], dataset: Path, tmp_path: Path
):
    request = stage_request(tiny_profile(), "cycle-2", dataset, tmp_path, checkpoints["cycle-1"])
    same, other = (prepare_stage(request.model_copy(update={"dataset_id": id_}), CPU) for id_ in (DATASET_ID, "b" * 64))
    assert (same.samples_seen(14), other.samples_seen(14), other.samples_seen(15)) == (14 * 8, 0, 8)
    assert same.tokens_seen(15) == other.tokens_seen(15) == 15 * 8 * 32


def test_dropout_is_drawn_from_seed_step_micro_step_and_rank():
    assert len({draw_seed(*drawn) for drawn in itertools.product(range(3), repeat=4)}) == 81


def test_a_warm_start_ends_with_its_optimizer_and_full_rank_stages_hand_theirs_on(dataset: Path, tmp_path: Path):
    warm = run_all(tiny_profile(), dataset, tmp_path / "relora")["warm-start"]
    assert SavedOptimizerState(warm / "optimizer.safetensors") == {}
    full = run_all(tiny_profile(method="full"), dataset, tmp_path / "full")
    state = SavedOptimizerState(full["full-3"] / "optimizer.safetensors")
    assert {float(entries["step"]) for entries in state.values()} == {22.0}


def test_full_rank_training_in_stages_equals_one_stage(dataset: Path, tmp_path: Path):
    """Cutting a run into stages changes nothing, bit for bit."""
    schedule = {"warm_start_steps": 0, "warmup_steps": 2, "restart_warmup_steps": 0}
    cut = run_all(
        tiny_profile(method="full", schedule={**schedule, "cycles": 4, "cycle_length": 4}), dataset, tmp_path / "cut"
    )
    whole = run_all(
        tiny_profile(method="full", schedule={**schedule, "cycles": 1, "cycle_length": 16}), dataset, tmp_path / "one"
    )
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (cut["full-4"] / name).read_bytes() == (whole["full-1"] / name).read_bytes()


def test_lora_never_merges_before_its_end(dataset: Path, tmp_path: Path):
    made = run_all(tiny_profile(method="lora"), dataset, tmp_path)
    assert list(made) == ["warm-start", "lora"]
    rates = [record["learning_rate"] for record in metrics_of(made["lora"])]
    assert rates[0] == 0 and min(rates[1:]) > 0
    name = "model.layers.0.mlp.up_proj.weight"
    delta = read_tensor(made["lora"], name) - read_tensor(made["warm-start"], name)
    assert np.linalg.matrix_rank(delta.double().numpy(), tol=1e-5) == 4


def test_bfloat16_checkpoints_hold_the_exact_master_plus_the_update(dataset: Path, tmp_path: Path):
    """Fault B4: merged in bfloat16, a small update is lost. Here W_parent + s * B A holds to float32 rounding."""
    made = run_all(tiny_profile(precision={"dtype": "bfloat16"}), dataset, tmp_path)
    adapter = load_file(made["cycle-2"] / "adapter" / "adapter_model.safetensors")
    module = "model.layers.1.self_attn.o_proj"
    A, B = (adapter[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
    parent, merged = (read_tensor(made[stage], f"{module}.weight") for stage in ("cycle-1", "cycle-2"))
    torch.testing.assert_close(merged, parent + B @ A, rtol=0, atol=1e-7)  # scaling is 1; |W| is below 0.1
    assert not torch.equal(merged, merged.bfloat16().float())


@pytest.mark.parametrize("micro_sequences", [1, 2, 4])
def test_accumulated_gradients_give_the_same_training_up_to_rounding(
    checkpoints: dict[str, Path], dataset: Path, tmp_path: Path, micro_sequences: int
):
    profile = tiny_profile(batch={"micro_sequences": micro_sequences})
    run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "out"), ignore)
    accumulated, whole = (metrics_of(c)[-1]["loss"] for c in (tmp_path / "out", checkpoints["warm-start"]))
    assert math.isclose(accumulated, whole, rel_tol=1e-4)


def test_dropout_is_drawn_anew_at_every_step_and_micro_step(dataset: Path, tmp_path: Path):
    with_dropout, without = (
        run_all(tiny_profile(relora={"dropout": p}, schedule={"cycles": 1}), dataset, tmp_path / str(p))
        for p in (0.5, 0.0)
    )
    assert (with_dropout["cycle-1"] / "model.safetensors").read_bytes() != (
        without["cycle-1"] / "model.safetensors"
    ).read_bytes()


def test_gpt_neox_and_llama_directories_can_be_continued(dataset: Path, checkpoints: dict[str, Path], tmp_path: Path):
    neox = tiny_gpt_neox()
    neox.resize_token_embeddings(VOCABULARY)
    neox.save_pretrained(tmp_path / "neox")
    for name, source in (("neox", tmp_path / "neox"), ("llama", checkpoints["warm-start"])):
        profile = tiny_profile(model={"pretrained": str(source)}, batch={"sequence_length": 16})
        made = run_all(profile, dataset, tmp_path / f"run-{name}")
        scores = manifest_of(made["cycle-2"])["evaluation"]
        assert scores["val_loss"] < scores["val_loss_before"]
        assert manifest_of(made["cycle-2"])["merge_report"]["layers"]


def test_a_diverging_run_commits_nothing(dataset: Path, tmp_path: Path):
    profile = tiny_profile(optimizer={"learning_rate": 1e6, "warm_start_learning_rate": 1e6, "max_grad_norm": None})
    with pytest.raises(DivergedError, match=r"diverged and nothing of this stage was committed.*learning_rate"):
        run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "out"), ignore)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(dataset: Path, tmp_path: Path):
    tiny_gpt_neox().save_pretrained(tmp_path / "small")
    profile = tiny_profile(model={"pretrained": str(tmp_path / "small")}, batch={"sequence_length": 16})
    with pytest.raises(VocabularyMismatchError, match=r"257 entries.*64 rows"):
        run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "out"), ignore)


def test_sequences_longer_than_the_pretrained_model_allows_are_refused(
    checkpoints: dict, dataset: Path, tmp_path: Path
):
    profile = tiny_profile(model={"pretrained": str(checkpoints["warm-start"])}, batch={"sequence_length": 128})
    with pytest.raises(SequenceTooLongError, match="128 is longer than the model's 64"):
        run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "out"), ignore)


def test_the_chunked_loss_is_the_mean_of_all_logits(checkpoints: dict[str, Path], dataset: Path):
    model = load_model(checkpoints["warm-start"]).double()
    tokens = torch.from_numpy(TokenDataset(dataset, "val", sequence_length=32).read_blocks(0, 4))
    logits = model(input_ids=tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(next_token_loss(model, tokens).double(), expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(model, tokens).double(), expected, rtol=1e-6, atol=0)


def test_the_state_file_says_where_the_run_stands(checkpoints: dict[str, Path]):
    state = json.loads((checkpoints["cycle-2"] / "training_state.json").read_text())
    assert (state["step"], state["cycle"], state["samples_seen"]) == (22, 2, 22 * 8)
    assert state["tokens_seen"] == 22 * 8 * 32  # fault R10: tokens, not sequences


def test_an_empty_prompt_is_continued_from_the_end_of_a_document(
    dataset: Path, warm_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun: list[list[int]] = []
    generate = LlamaForCausalLM.generate

    def watched(model: Any, ids: torch.Tensor, **options: Any) -> Any:
        begun.append(ids[0].tolist())
        return generate(model, ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", watched)
    request = EvaluationRequest(
        profile=tiny_profile(evaluation={"sample_prompts": ("", "ab"), "sample_tokens": 4}),
        checkpoint_directory=warm_start,
        dataset_directory=dataset,
        result_path=tmp_path / "result.json",
        sequences=2,
    )
    evaluate_checkpoint(request, ignore)
    samples = json.loads((tmp_path / "result.json").read_text())["samples"]
    assert [sample["prompt"] for sample in samples] == ["", "ab"]
    assert begun[0] == [VOCABULARY - 1] and len(begun[1]) == 2  # the tiny tokenizer's end of a document; two bytes


@pytest.mark.parametrize(("prompt", "tokens"), [("a" * 40, 4), ("ab", 400), ("", 400), ("a" * 16, 16)])
def test_a_prompt_beyond_the_models_positions_is_no_end_of_a_run(dataset: Path, prompt: str, tokens: int):
    """Positions that are learned: there is no vector for the seventeenth."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    objective = objective_of(tiny_profile(evaluation={"sample_prompts": (prompt,), "sample_tokens": tokens}))
    (sample,) = objective.sample(model, dataset, SimpleNamespace(bos_ids=(), eos_id=VOCABULARY - 1), CPU)
    assert sample["prompt"] == prompt
