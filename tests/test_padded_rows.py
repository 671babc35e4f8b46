"""Labelled texts and prompts are rows as transformers' own tokenizer makes them: framed, cut by its rule, padded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instructions import WORDS, record, write_records
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from relora_train.data.packed_dataset import TooLong
from relora_train.data.padded_dataset import PADDING, LabelledTexts, PromptPairs, longest_first
from relora_train.data.prepare import PreparedDataset, prepare_dataset
from relora_train.errors import CorpusTooSmallError, DataError
from relora_train.settings.data import DataConfig, TokenizerConfig

RECORDS = [record(seed) for seed in range(120)]
LENGTH = 14


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words, framed as BERT frames them: [CLS] a [SEP], [CLS] a [SEP] b [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    made.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def prepared(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreparedDataset]:
    directory = tmp_path_factory.mktemp("data")
    path = write_records(directory / "a.jsonl", RECORDS)
    sections: dict[str, dict[str, Any]] = {
        "texts": {"labels": {}},
        "pairs": {"labels": {"text_pair_field": "pair"}},
        "prompts": {"instructions": {"prompt": "prompt", "completion": "completion"}},
    }
    fixed: dict[str, Any] = {"source": "jsonl", "paths": (str(path),), "workers": 1, "validation_fraction": 0.2}
    return {
        name: prepare_dataset(
            DataConfig(**fixed, shard_tokens=1024, **given), TokenizerConfig(path=str(tokenizer)), directory / name
        )
        for name, given in sections.items()
    }


def rows_of(made: PreparedDataset, split: Any, **given: Any) -> tuple[list[tuple[int, ...]], dict[str, int]]:
    kind = LabelledTexts if made.manifest.examples and made.manifest.examples.kind == "labels" else PromptPairs
    data = kind(made.directory, split, sequence_length=LENGTH, manifest=made.manifest, **given)
    return [tuple(row) for row in data.read_blocks(0, data.blocks).tolist()], data.left_out


@pytest.mark.parametrize("kind", ["texts", "pairs"])
@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_a_labelled_text_is_what_transformers_makes_of_it_and_its_class(
    prepared: dict[str, PreparedDataset], tokenizer: Path, kind: str, too_long: TooLong
):
    made = prepared[kind]
    assert made.manifest.examples and made.manifest.examples.classes == ("a", "b", "c")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    expected, long = list[tuple[int, ...]](), 0
    for one in RECORDS:
        texts = (one["text"], one["pair"]) if kind == "pairs" else (one["text"],)
        ids = theirs(*texts, truncation="longest_first", max_length=LENGTH)["input_ids"]
        is_long = len(theirs(*texts)["input_ids"]) > LENGTH
        long += is_long
        if too_long == "cut" or not is_long:
            expected.append((*ids, *[PADDING] * (LENGTH - len(ids)), "abc".index(one["label"])))
    found, counts = list[tuple[int, ...]](), {"cut": 0, "dropped": 0}
    for split in ("train", "val"):
        rows, left_out = rows_of(made, split, too_long=too_long)
        found += rows
        counts = {key: counts[key] + left_out[key] for key in counts}
    assert sorted(found) == sorted(expected)
    assert counts == ({"cut": long, "dropped": 0} if too_long == "cut" else {"cut": 0, "dropped": long})
    assert long > 10 if kind == "pairs" else long == 0


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_prompt_and_completion_are_padded_each_by_itself(
    prepared: dict[str, PreparedDataset], tokenizer: Path, too_long: TooLong
):
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    target, expected, long = 6, list[tuple[int, ...]](), 0
    for one in RECORDS:
        source = theirs(one["prompt"], truncation=True, max_length=LENGTH)["input_ids"]
        answer = theirs(one["completion"], add_special_tokens=False)["input_ids"] + [3]  # the separator
        long += len(answer) > target
        if too_long == "cut" or len(answer) <= target:
            answer = answer[:target]
            pads = [PADDING] * (LENGTH - len(source)), [PADDING] * (target - len(answer))
            expected.append((*source, *pads[0], *answer, *pads[1]))
    parts = [rows_of(prepared["prompts"], split, target_length=target, too_long=too_long) for split in ("train", "val")]
    assert sorted(row for rows, _ in parts for row in rows) == sorted(expected)
    assert sum(left_out["cut" if too_long == "cut" else "dropped"] for _, left_out in parts) == long > 10


def test_two_texts_are_cut_token_by_token_from_the_longer_one():
    for first, second, room in [(a, b, r) for a in range(9) for b in range(9) for r in range(10)]:
        sizes, longer = [first, second], int(second >= first)
        while sum(sizes) > room:
            sizes[longer if sizes[longer] > sizes[1 - longer] else 1 - longer] -= 1
        assert longest_first(first, second, room) == tuple(sizes)


def test_a_batch_holds_rows_of_the_shuffled_split(prepared: dict[str, PreparedDataset]):
    made = prepared["pairs"]
    data = LabelledTexts(made.directory, "train", sequence_length=LENGTH, seed=3, manifest=made.manifest)
    epoch = np.vstack([data.read_batch(start, 10) for start in range(0, data.blocks - 10, 10)])
    every = data.read_blocks(0, data.blocks)
    assert {row.tobytes() for row in epoch} <= {row.tobytes() for row in every}
    assert not np.array_equal(epoch, every[: len(epoch)])
    shares = [data.read_batch(5, 9, rank=rank, world_size=2) for rank in (0, 1)]
    assert np.array_equal(data.read_batch(5, 9)[::2], shares[0]) and np.array_equal(
        data.read_batch(5, 9)[1::2], shares[1]
    )
    with pytest.raises(CorpusTooSmallError, match="examples; 1,000 are needed"):
        data.read_batch(0, 1000)


def test_a_dataset_of_another_kind_is_refused(prepared: dict[str, PreparedDataset]):
    made = prepared["prompts"]
    with pytest.raises(DataError, match=r"holds no labels, .*data\.labels"):
        LabelledTexts(made.directory, "train", sequence_length=LENGTH, manifest=made.manifest)
    made = prepared["pairs"]
    with pytest.raises(DataError, match=r"holds no instructions with prompt and completion"):
        PromptPairs(made.directory, "train", sequence_length=LENGTH, target_length=4, manifest=made.manifest)


def test_classes_are_in_their_order_and_a_text_of_two_classes_is_on_one_side(tokenizer: Path, tmp_path: Path):
    labels = [10, 9, 2]
    rows = [{"text": one["text"], "label": label} for one in RECORDS for label in labels]
    fixed: dict[str, Any] = {"source": "jsonl", "workers": 1, "validation_fraction": 0.3, "labels": {}}
    data = DataConfig(paths=(str(write_records(tmp_path / "a.jsonl", rows)),), **fixed)
    made = prepare_dataset(data, TokenizerConfig(path=str(tokenizer)), tmp_path / "work")
    assert made.manifest.examples and made.manifest.examples.classes == ("2", "9", "10")
    assert json.loads(made.manifest.to_bytes())["examples"]["classes"] == ["2", "9", "10"]
    train, val = ({row[:-1] for row in rows_of(made, split)[0]} for split in ("train", "val"))
    assert len(train) > 50 and len(val) > 20 and not train & val
