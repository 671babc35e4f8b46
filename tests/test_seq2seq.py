"""objective = "seq2seq": an encoder reads a prompt, a decoder learns its completion by teacher forcing."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import ignore, manifest_of, metrics_of, run_all, stage_request, tiny_profile
from test_ranks import by_two_ranks
from test_snapshot import run_with_stops
from torch.nn import functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from relora_train.data.padded_dataset import PADDING, PromptPairs
from relora_train.data.prepare import prepare_dataset
from relora_train.errors import ModelUnsuitableError, SequenceTooLongError
from relora_train.method.fast_path import share_inputs
from relora_train.method.layer import relora_layers
from relora_train.method.wrap import apply_relora
from relora_train.runs.plan import plan
from relora_train.settings.profile import Profile
from relora_train.training.evaluate import evaluation_key
from relora_train.training.files import write_manifest
from relora_train.training.models.registry import model_shape, objective_of
from relora_train.training.models.seq2seq import TargetLoss
from relora_train.training.trainer import run_stage

SCHEDULE = {"warm_start_steps": 4, "cycles": 1, "cycle_length": 8, "warmup_steps": 2, "restart_warmup_steps": 1}
SHAPE = {"sequences": 8, "sequence_length": 16, "target_length": 12}
WORDS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"]


def seq2seq_profile(corpus: Path, **sections: Any) -> Profile:
    data = {"source": "jsonl", "paths": [str(corpus)], "validation_fraction": 0.3,
            "instructions": {"prompt": "prompt", "completion": "completion"}}  # fmt: skip
    settings = {"tokenizer": {"vocab_size": 280}, "batch": SHAPE, **sections}
    return tiny_profile(objective="seq2seq", data=data, **settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of words, of which the completion is the first one, once or twice: as the last one says."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("corpus") / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(700):
            words, twice = rng.choices(WORDS, k=rng.randint(1, 3)), rng.random() < 0.5
            record = {"prompt": " ".join([*words, "x" if twice else "y"]), "completion": words[0] * (1 + twice)}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    profile = seq2seq_profile(corpus)
    made = prepare_dataset(profile.data, profile.tokenizer, tmp_path_factory.mktemp("data"))
    write_manifest(made.manifest, made.directory)
    return made.directory


@pytest.fixture(scope="module")
def trained(corpus: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    schedule = {"warm_start_steps": 90, "cycles": 2, "cycle_length": 40, "warmup_steps": 5, "restart_warmup_steps": 2}
    profile = seq2seq_profile(
        corpus, schedule=schedule, batch={**SHAPE, "sequences": 32}, evaluation={"sequences": 1000}
    )
    return run_all(profile, dataset, tmp_path_factory.mktemp("run"))


def tiny_t5(**changes: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 280,
        "d_model": 32,
        "d_ff": 48,
        "d_kv": 16,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }
    return T5ForConditionalGeneration(T5Config(**{**shape, "decoder_start_token_id": 0, **changes}))


def rows_of(dataset: Path, count: int) -> torch.Tensor:
    data = PromptPairs(dataset, "val", sequence_length=16, target_length=12)
    return torch.from_numpy(data.read_blocks(0, count))


def by_hand(model: Any, row: torch.Tensor) -> torch.Tensor:
    """The summed loss of one example without padding, by the model's own loss."""
    source, target = (part[part != PADDING][None] for part in (row[:16], row[16:]))
    scores = model(input_ids=source, labels=target).logits
    return F.cross_entropy(scores[0], target[0], reduction="sum")


# --- the model


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_loss_of_padded_rows_is_that_of_each_alone(family: str, dataset: Path):
    model: Any = tiny_t5(feed_forward_proj="gated-gelu").eval()
    if family == "bart":
        torch.manual_seed(0)
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=280, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
                encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64,
            )
        ).eval()  # fmt: skip
    rows, function = rows_of(dataset, 12), TargetLoss(model, 16)
    with torch.no_grad():
        alone = [float(by_hand(model, row)) for row in rows]
        assert float(function.loss(rows)) == pytest.approx(sum(alone), rel=1e-6)
        nats, tokens, _, examples = function.sums(rows).tolist()
    assert nats == pytest.approx(sum(alone), rel=1e-6)
    assert tokens == int(function.terms(rows)) == int((rows[:, 16:] != PADDING).sum()) and examples == 12


def test_layers_of_encoder_and_decoder_are_wrapped_and_the_fast_path_gives_the_references_gradients(dataset: Path):
    rows, outcomes = rows_of(dataset, 6), []
    for fast in (False, True):
        model = tiny_t5()
        names = apply_relora(model, rank=4, alpha=8, dropout=0.0, target_modules=None, seed=0)
        with torch.no_grad():
            for number, (_, layer) in enumerate(relora_layers(model)):
                layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
        if fast:
            share_inputs(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        TargetLoss(model, 16).loss(rows).backward()
        outcomes.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(names) == 2 * 6 + 2 * 10 and sum("EncDecAttention" in name for name in names) == 8
    assert not any("relative" in name or "lm_head" in name for name in names)
    assert {f"{name}.lora_B" for name in names} <= outcomes[0].keys() == outcomes[1].keys()
    for name, gradient in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 1}])
def test_a_plan_counts_a_t5(corpus: Path, tmp_path: Path, changes: dict[str, Any]):
    model = tiny_t5(**changes)
    model.save_pretrained(tmp_path)
    planned = plan(seq2seq_profile(corpus, model={"pretrained": str(tmp_path)}))
    # Uneven stacks are counted as a mean over the blocks.
    assert planned.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), abs=8 if changes else 0)
    apply_relora(model, rank=4, alpha=4, dropout=0.0, target_modules=None, seed=0)
    assert planned.low_rank is not None and planned.rough
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.low_rank.trainable_parameters == pytest.approx(trainable, abs=16 if changes else 0)


def test_a_new_t5_is_the_one_that_is_planned_and_others_are_refused(corpus: Path, dataset: Path, tmp_path: Path):
    profile = seq2seq_profile(corpus)
    objective, manifest = (
        objective_of(profile),
        PromptPairs(dataset, "val", sequence_length=16, target_length=12).manifest,
    )
    model = objective.build_model(manifest)
    objective.check_fits(model, manifest)
    counted = profile.model_copy(
        update={"tokenizer": profile.tokenizer.model_copy(update={"vocab_size": manifest.vocab_size})}
    )
    assert model_shape(counted).parameters == sum(p.numel() for p in model.parameters())
    from transformers import T5EncoderModel

    T5EncoderModel(tiny_t5().config).save_pretrained(tmp_path)
    with pytest.raises(ModelUnsuitableError, match="lack"):
        objective_of(seq2seq_profile(corpus, model={"pretrained": str(tmp_path)})).load_pretrained()
    short = BartForConditionalGeneration(
        BartConfig(
            vocab_size=280, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, max_position_embeddings=20,
        )
    )  # fmt: skip
    with pytest.raises(SequenceTooLongError, match=r"batch.target_length 24 is longer than the model's 20"):
        objective_of(seq2seq_profile(corpus, batch={**SHAPE, "target_length": 24})).check_fits(short, manifest)


# --- training


def test_scores_of_other_targets_are_not_reused(corpus: Path, dataset: Path, tmp_path: Path):
    def key(**changes: Any) -> str:
        profile = seq2seq_profile(corpus, batch={**SHAPE, **changes})
        return evaluation_key(stage_request(profile, "warm-start", dataset, tmp_path))

    assert len({key(), key(target_length=6), key(too_long="drop"), key(sequence_length=8)}) == 4 and key() == key()


def test_training_learns_and_exact_match_is_that_of_greedy_decoding(trained: dict[str, Path], dataset: Path):
    scores = manifest_of(trained["cycle-2"])["evaluation"]
    assert scores["val_exact_match"] > 0.5 and scores["val_loss"] < 0.5 * scores["val_loss_before"] + 0.2
    assert manifest_of(trained["warm-start"])["evaluation"]["val_exact_match_before"] < 0.05
    model = AutoModelForSeq2SeqLM.from_pretrained(trained["cycle-2"]).eval()
    rows = rows_of(dataset, int(scores["val_examples"]))
    met = 0
    for row in rows[:60]:
        source, target = (part[part != PADDING] for part in (row[:16], row[16:]))
        with torch.no_grad():
            made = model.generate(
                source[None], attention_mask=torch.ones_like(source[None]), max_new_tokens=12, do_sample=False
            )
        met += made[0, 1:].tolist() == target.tolist()
    with torch.no_grad():
        expected = TargetLoss(model, 16).sums(rows[:60])[2]
        whole = TargetLoss(model, 16).sums(rows)
    assert met == expected and met > 0
    assert scores["val_exact_match"] == pytest.approx(float(whole[2] / whole[3]), abs=1e-9)
    merges = [manifest_of(trained[f"cycle-{k}"])["merge_report"] for k in (1, 2)]
    assert all(merge["max_relative_output_change"] < 1e-5 and len(merge["layers"]) == 32 for merge in merges)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_the_adapter_on_its_base_gives_the_checkpoints_logits(trained: dict[str, Path], dataset: Path, tmp_path: Path):
    from peft import PeftModel

    from relora_train.training.peft_export import write_adapter

    write_adapter(
        trained["cycle-2"], trained["cycle-1"], tmp_path, base_name=str(trained["cycle-1"]), checkpoint_name="it"
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    load, rows = AutoModelForSeq2SeqLM.from_pretrained, rows_of(dataset, 4)
    adapted = PeftModel.from_pretrained(load(trained["cycle-1"]), str(tmp_path)).eval()
    with torch.no_grad():
        found, expected = (TargetLoss(m, 16).logits(rows) for m in (adapted, load(trained["cycle-2"]).eval()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def run_stage_of(profile: Profile, stage: str, dataset: Path, out: Path, parent: Path | None = None) -> None:
    run_stage(stage_request(profile, stage, dataset, out, parent), ignore)


def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(corpus: Path, dataset: Path, tmp_path: Path):
    profile = seq2seq_profile(corpus, relora={"dropout": 0.2}, schedule={**SCHEDULE, "warm_start_steps": 0})
    run_stage_of(profile, "cycle-1", dataset, tmp_path / "whole")
    run_with_stops(stage_request(profile, "cycle-1", dataset, tmp_path / "stopped"), [3, 6], tmp_path / "snapshots")
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_micro_batches_and_two_ranks_train_as_the_one_big_batch(corpus: Path, dataset: Path, tmp_path: Path):
    def losses(name: str) -> list[float]:
        return [record["loss"] for record in metrics_of(tmp_path / name / "out")]

    run_stage_of(seq2seq_profile(corpus, schedule=SCHEDULE), "warm-start", dataset, tmp_path / "one" / "out")
    micro = seq2seq_profile(corpus, schedule=SCHEDULE, batch={**SHAPE, "micro_sequences": 2})
    run_stage_of(micro, "warm-start", dataset, tmp_path / "micro" / "out")
    (tmp_path / "ranks").mkdir()
    shared = seq2seq_profile(corpus, schedule=SCHEDULE, launch={"nproc_per_node": 2, "threads": 1})
    by_two_ranks(stage_request(shared, "warm-start", dataset, tmp_path / "ranks" / "out"))
    assert losses("micro") == pytest.approx(losses("one"), rel=1e-6)
    assert losses("ranks") == pytest.approx(losses("one"), rel=1e-6)
