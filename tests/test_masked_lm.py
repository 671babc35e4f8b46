"""objective = "masked_lm": hidden tokens, which follow from an example's place, are predicted from both sides."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_runs import ignore, manifest_of, metrics_of, run_all, stage_request, tiny_profile
from test_ranks import by_two_ranks
from test_snapshot import run_with_stops
from tiny_data import VOCABULARY, write_tiny_dataset
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
)

from relora_train.checkpoints.manifest import describe_files
from relora_train.data.dataset import ExampleDataset, read_dataset_manifest
from relora_train.data.masking import Masking
from relora_train.data.prepare import describe_dataset
from relora_train.data.tokenizer import DEFAULT_MASK_TOKEN, find_mask_id, load_tokenizer, train_tokenizer
from relora_train.errors import ModelUnsuitableError, SequenceTooLongError, TokenizerError
from relora_train.method.wrap import apply_relora
from relora_train.runs.plan import plan
from relora_train.settings.profile import Profile
from relora_train.training.files import write_manifest
from relora_train.training.models.registry import facts_of, model_shape, objective_of
from relora_train.training.trainer import run_stage

SCHEDULE = {"warm_start_steps": 4, "cycles": 1, "cycle_length": 8, "warmup_steps": 2, "restart_warmup_steps": 1}


def masked_profile(**sections: Any) -> Profile:
    return tiny_profile(objective="masked_lm", **sections)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_dataset(tmp_path_factory.mktemp("data") / "dataset")
    manifest = read_dataset_manifest(directory)
    for split, size in (("train", 640), ("val", 128)):  # each sequence repeats one of 24 tokens
        tokens = np.random.default_rng(size).integers(0, 24, size).repeat(32)
        np.append(tokens, 0).astype("<u2").tofile(directory / split / "shard-00000.bin")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([DEFAULT_MASK_TOKEN])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "manifest.json").unlink()
    whole = manifest.model_copy(update={"vocab_size": VOCABULARY + 1, "files": describe_files(directory)})
    write_manifest(whole, directory)
    return directory


@pytest.fixture(scope="module")
def checkpoints(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    longer = {"warm_start_steps": 60, "cycles": 2, "cycle_length": 30, "warmup_steps": 5, "restart_warmup_steps": 2}
    return run_all(masked_profile(schedule=longer), dataset, tmp_path_factory.mktemp("run"))


def opened(dataset: Path, split: str = "train", **sections: Any) -> ExampleDataset:
    return objective_of(masked_profile(**sections)).open_data(dataset, split)  # type: ignore[arg-type]


# --- rows


def test_of_the_tokens_15_percent_are_hidden_and_of_those_80_behind_the_mask_10_behind_others():
    masking = Masking(mask_id=1000, vocab_size=1001, markers=(0, 1000))
    ids = np.random.default_rng(0).integers(0, 1000, (2000, 101))
    rows = masking.hide(ids, [(5, number) for number in range(len(ids))])
    inputs, targets, found = rows[:, :100], rows[:, 100:], ids[:, :100]
    hidden = targets >= 0
    assert np.array_equal(targets[hidden], found[hidden]) and (targets[~hidden] == -1).all()
    assert np.array_equal(inputs[~hidden], found[~hidden]) and not hidden[found == 0].any()
    masked, kept = inputs[hidden] == 1000, inputs[hidden] == found[hidden]
    # Binomial: three standard errors of 200,000 and 30,000 draws.
    assert hidden.mean() == pytest.approx(0.15 * 0.999, abs=0.0024)
    assert masked.mean() == pytest.approx(0.8, abs=0.007) and kept.mean() == pytest.approx(0.1, abs=0.0055)


def test_a_row_follows_from_its_place_alone_and_hides_other_tokens_in_the_next_epoch(dataset: Path):
    data, other = opened(dataset), opened(dataset)
    whole = data.read_batch(5, 8)
    shares = [other.read_batch(5, 8, rank=rank, world_size=2) for rank in (0, 1)]
    assert np.array_equal(whole[0::2], shares[0]) and np.array_equal(whole[1::2], shares[1])
    assert np.array_equal(whole[3], other.read_batch(8, 2)[0])
    assert data._order is not None
    data._order = (1, data._order[1])  # the same examples in the next epoch
    again, shown = data.read_batch(5 + data.blocks, 8), whole[:, 32:] < 0
    unhidden = shown & (again[:, 32:] < 0)
    assert np.array_equal(again[:, :32][unhidden], whole[:, :32][unhidden]) and not np.array_equal(again, whole)
    assert not np.array_equal(opened(dataset, seed=1).read_batch(5, 8), whole)


def test_held_out_examples_hide_the_same_tokens_for_every_seed_and_batch(dataset: Path):
    one, other = opened(dataset, "val"), opened(dataset, "val", seed=1)
    assert np.array_equal(one.read_blocks(0, 6), np.concatenate([other.read_blocks(0, 2), other.read_blocks(2, 4)]))
    assert np.array_equal(one.read_spread(0, one.blocks, of=one.blocks), other.read_blocks(0, other.blocks))


# --- tokenizers


def test_a_trained_tokenizer_has_a_mask_for_this_objective_alone(tmp_path: Path):
    (tmp_path / "text.txt").write_text("a text\n" * 9)
    data = {"source": "text", "paths": [str(tmp_path / "text.txt")]}
    masked, causal = masked_profile(data=data), tiny_profile(data=data)
    tokenizers = [facts_of(profile).tokenizer() for profile in (masked, causal)]
    assert [settings.mask_token for settings in tokenizers] == [DEFAULT_MASK_TOKEN, None]
    ids = [describe_dataset(masked.data, settings)[0] for settings in tokenizers]
    assert ids[0] != ids[1] and ids[1] == describe_dataset(causal.data, causal.tokenizer)[0]
    trained = train_tokenizer(["a text"], vocab_size=300, mask_token="[MASK]")
    trained.save(tmp_path)
    assert find_mask_id(tmp_path, None) == 1 and trained.eos_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token == "[MASK]"
    assert 1 not in trained.encoder().encode("a [MASK] text", add_special_tokens=False).ids  # no text forges it


def test_a_loaded_tokenizer_without_a_mask_is_refused_before_anything_is_tokenized(tmp_path: Path):
    train_tokenizer(["a text"], vocab_size=300).save(tmp_path)
    profile = masked_profile(tokenizer={"path": str(tmp_path)})
    with pytest.raises(TokenizerError, match=r"has no mask token \(\[MASK\], <mask>, <\|mask\|>\)"):
        facts_of(profile).check_tokenizer(load_tokenizer(str(tmp_path)))
    named = masked_profile(tokenizer={"path": str(tmp_path), "mask_token": "<|endoftext|>"})
    facts_of(named).check_tokenizer(load_tokenizer(str(tmp_path)))


# --- models


def tiny_bert(made: type = BertForMaskedLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, type_vocab_size=1, pad_token_id=None, **changes,
    )  # fmt: skip
    return made(config).eval()


def test_a_plan_counts_the_model_that_is_trained(checkpoints: dict[str, Path]):
    profile, model = masked_profile(tokenizer={"vocab_size": VOCABULARY + 1}), tiny_bert()
    planned = plan(profile)
    assert planned.rough and planned.low_rank and planned.parameters == sum(p.numel() for p in model.parameters())
    apply_relora(model, rank=4, alpha=4, dropout=0.0, target_modules=None, seed=0)
    assert planned.low_rank.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model_shape(masked_profile(model={"pretrained": str(checkpoints["cycle-2"])})) == model_shape(profile)


def test_a_model_that_does_not_look_ahead_or_is_too_short_is_refused(dataset: Path):
    objective = objective_of(masked_profile())
    manifest = opened(dataset).manifest
    objective.loss_function(tiny_bert(), manifest)
    with pytest.raises(ModelUnsuitableError, match="does not read those after it"):
        objective.loss_function(tiny_bert(is_decoder=True), manifest)
    roberta = RobertaConfig(
        vocab_size=VOCABULARY + 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=33,
    )  # fmt: skip  # of which RoBERTa uses those from 2 on
    with pytest.raises(SequenceTooLongError, match="than the model's 31 positions"):
        objective.check_fits(RobertaForMaskedLM(roberta), manifest)


def test_a_pretrained_bert_is_continued_without_its_other_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = tiny_bert(BertForPreTraining)
    model.save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        loaded = objective_of(masked_profile(model={"pretrained": str(tmp_path)})).load_pretrained()
    ids = torch.arange(12).reshape(1, 12)
    expected = model(input_ids=ids).prediction_logits
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected)
    assert "heads for other tasks" in caplog.text and "bert.pooler.dense.bias" in caplog.text
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnsuitableError, match=r"lack bert\.encoder\.layer\.1\.output\.dense\.weight"):
        objective_of(masked_profile(model={"pretrained": str(tmp_path)})).load_pretrained()


# --- training


def test_training_learns_and_plain_from_pretrained_gives_the_scores_the_trainer_measured(
    checkpoints: dict[str, Path], dataset: Path
):
    scores = [manifest_of(checkpoint)["evaluation"] for checkpoint in checkpoints.values()]
    assert scores[0]["val_loss_before"] == pytest.approx(math.log(VOCABULARY + 1), abs=0.2)
    assert scores[-1]["val_loss"] < 0.5 * math.log(24)  # without its neighbours a token is one of 24
    assert scores[-1]["val_masked_perplexity"] == pytest.approx(math.exp(scores[-1]["val_loss"]))
    assert all(
        manifest_of(checkpoints[f"cycle-{k}"])["merge_report"]["max_relative_output_change"] < 1e-5 for k in (1, 2)
    )
    model = AutoModelForMaskedLM.from_pretrained(checkpoints["cycle-2"]).eval()
    rows = torch.from_numpy(opened(dataset, "val").read_spread(0, 16, of=16))
    nats = terms = 0.0
    for row in rows:  # one by one
        hidden = row[32:] >= 0
        with torch.no_grad():
            scores_of_row = model(input_ids=row[:32].unsqueeze(0)).logits[0, hidden]
        nats += float(F.cross_entropy(scores_of_row, row[32:][hidden], reduction="sum"))
        terms += int(hidden.sum())
    assert scores[-1]["val_masked_tokens"] == terms
    assert scores[-1]["val_loss"] == pytest.approx(nats / terms, rel=1e-6)


def run_stage_of(profile: Profile, stage: str, dataset: Path, out: Path, parent: Path | None = None) -> None:
    run_stage(stage_request(profile, stage, dataset, out, parent), ignore)


def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(dataset: Path, tmp_path: Path):
    profile = masked_profile(relora={"dropout": 0.2}, schedule=SCHEDULE)
    run_stage_of(profile, "warm-start", dataset, tmp_path / "warm")
    run_stage_of(profile, "cycle-1", dataset, tmp_path / "whole", tmp_path / "warm")
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "stopped", tmp_path / "warm")
    run_with_stops(request, [6, 9], tmp_path / "snapshots")
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_micro_batches_and_two_ranks_give_the_loss_of_the_one_big_batch(dataset: Path, tmp_path: Path):
    """Hidden tokens are not as many in each part: a mean of means would differ in the third digit."""

    def losses(name: str) -> list[float]:
        return [record["loss"] for record in metrics_of(tmp_path / name / "out")]

    run_stage_of(masked_profile(schedule=SCHEDULE), "warm-start", dataset, tmp_path / "one" / "out")
    micro = masked_profile(schedule=SCHEDULE, batch={"micro_sequences": 2})
    run_stage_of(micro, "warm-start", dataset, tmp_path / "micro" / "out")
    (tmp_path / "ranks").mkdir()
    shared = masked_profile(schedule=SCHEDULE, launch={"nproc_per_node": 2, "threads": 1})
    by_two_ranks(stage_request(shared, "warm-start", dataset, tmp_path / "ranks" / "out"))
    assert losses("micro") == pytest.approx(losses("one"), rel=1e-6)
    assert losses("ranks") == pytest.approx(losses("one"), rel=1e-6)
