"""Conversations and prompts become shards that say which tokens are answers; any number of workers, killed or not."""

import csv
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from instructions import CHATML, MARKED, record, write_records
from pydantic import ValidationError
from test_prepare import contents, request_for, start, wait_until
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from relora_train.checkpoints.example_format import ExampleFormat
from relora_train.checkpoints.manifest import hash_file
from relora_train.data.chat import BROKEN, ChatTemplate
from relora_train.data.dataset import map_files, map_shards
from relora_train.data.engines import choose_engine
from relora_train.data.example_shards import ExampleEncoder
from relora_train.data.packed_dataset import FIRST, PackedTokens
from relora_train.data.prepare import PreparedDataset, prepare_dataset
from relora_train.data.sources import read_documents, resolve_source
from relora_train.data.tokenizer import TRICKY_TEXTS, DocumentTokenizer, load_tokenizer, train_tokenizer
from relora_train.settings.data import DataConfig, TokenizerConfig

TOKENIZER = TokenizerConfig(vocab_size=300)
RECORDS = [record(seed) for seed in range(200)]


def settings(path: Path, **given: Any) -> DataConfig:
    fixed = {"source": "jsonl", "paths": (str(path),), "shard_tokens": 4_000, "validation_fraction": 0.2, "workers": 1}
    return DataConfig(**{**fixed, **given})


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("instructions")
    write_records(directory / "records.jsonl", RECORDS)
    (directory / "chatml.jinja").write_text(CHATML)
    (directory / "marked.jinja").write_text(MARKED)
    return directory


def prepare(home: Path, template: str = "chatml", **given: Any) -> PreparedDataset:
    instructions = {"messages": "messages", "chat_template": str(home / f"{template}.jinja")}
    data = settings(home / "records.jsonl", **{"instructions": instructions, **given})
    name = "-".join([template, str(data.workers), str(data.instructions.messages)])
    return prepare_dataset(data, TOKENIZER, home / name)


@pytest.fixture(scope="module")
def prepared(home) -> PreparedDataset:
    return prepare(home)


def examples_of(prepared: PreparedDataset, split: str) -> list[tuple[list[int], list[int]]]:
    """The ids of each example of a split, and which of them are learned."""
    found = []
    parts = (map_files(prepared.directory, split, prepared.manifest, *of) for of in [("ends", "u8"), ("scored", "u1")])
    for ids, ends, scored in zip(map_shards(prepared.directory, split, prepared.manifest), *parts, strict=True):
        assert ends[-1] == len(ids) == len(scored)
        starts = [0, *ends[:-1].astype(int)]
        found += [(ids[a:b].tolist(), scored[a:b].tolist()) for a, b in zip(starts, ends.astype(int), strict=True)]
    return found


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_ids_are_those_of_apply_chat_template_and_answers_are_what_the_assistant_said(home, template):
    made = prepare(home, template)
    tokenizer = AutoTokenizer.from_pretrained(made.directory)
    assert (made.directory / "chat_template.jinja").read_text() == (CHATML if template == "chatml" else MARKED)
    expected = {}
    for one in RECORDS:
        ids = tokenizer.apply_chat_template(one["messages"])["input_ids"]
        answers = [m["content"] + "<|im_end|>" for m in one["messages"] if m["role"] == "assistant"]
        expected[tuple(ids)] = "".join(answers)
    found = {split: examples_of(made, split) for split in ("train", "val")}
    assert min(map(len, found.values())) > 20
    assert {tuple(ids) for split in found for ids, _ in found[split]} == set(expected)
    for ids, scored in (example for split in found for example in found[split]):
        assert tokenizer.decode([i for i, learned in zip(ids, scored, strict=True) if learned]) == expected[tuple(ids)]


@pytest.mark.parametrize("marks", [False, True])
def test_messages_that_jinja_renders_directly_are_those_of_transformers(marks):
    known = "{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ strftime_now('%Y-%m-%d') }}"
    text = known + (MARKED if marks else CHATML).replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    direct = ChatTemplate(text, {"bos_token": "<s>"}, ("<s>", "<|im_end|>"))
    through = replace(direct)
    vars(through)["_compiled"] = None
    assert direct._compiled is not None, "transformers has renamed what makes rendering twice as fast"
    for one in RECORDS[:20]:
        parts = direct.parts(one["messages"], "here")
        assert parts == through.parts(one["messages"], "here")
        assert parts[0].startswith("<s>TrueTrue2024-07-26<|im_start|>")
    thought = [{"role": "user", "content": "a<s>"}, {"role": "assistant", "content": "b", "thinking": "why"}]
    assert direct.parts(thought, "here") == through.parts(thought, "here")
    assert "whyb" in direct.parts(thought, "here")[1]


def test_a_prompt_is_given_and_its_completion_learned_with_the_separator(home):
    made = prepare(home, instructions={"prompt": "prompt", "completion": "completion"})
    tokenizer = Tokenizer.from_file(str(made.directory / "tokenizer.json"))
    found = set()
    for ids, scored in examples_of(made, "train") + examples_of(made, "val"):
        begin = scored.index(1)
        assert scored == [0] * begin + [1] * (len(ids) - begin)
        assert ids[-1] == made.manifest.eos_id
        found.add((tokenizer.decode(ids[:begin]), tokenizer.decode(ids[begin:-1])))
    assert found == {(one["prompt"], one["completion"]) for one in RECORDS}


def test_any_number_of_workers_gives_the_same_bytes(home, prepared):
    one, three = ({e.path: e.sha256 for e in made.manifest.files} for made in (prepared, prepare(home, workers=3)))
    assert one == three
    for path, digest in one.items():
        assert hash_file(prepared.directory / path) == digest


def test_rows_hold_every_example_once_whole_and_nothing_else(prepared):
    width = 401
    data = PackedTokens(prepared.directory, "train", sequence_length=width - 1, manifest=prepared.manifest)
    assert data.left_out == {"cut": 0, "dropped": 0}
    rows = data.read_blocks(0, data.blocks)
    assert rows.shape == (data.blocks, width)
    found = []
    for row in rows:
        begins = np.flatnonzero(row < -FIRST)
        assert begins[0] == 0
        for begin, end in itertools.pairwise([*begins, width]):
            example = row[begin:end]
            ids = np.where(example < 0, ~example, example) & (FIRST - 1)
            found.append((ids.tolist(), [0, *(example[1:] >= 0).astype(int).tolist()]))
    padding = [one for one in found if not any(one[1])]
    assert {number for ids, _ in padding for number in ids} == {prepared.manifest.eos_id}
    assert sorted(one for one in found if any(one[1])) == sorted(examples_of(prepared, "train"))
    assert sum(len(ids) for ids, _ in padding) < 0.1 * rows.size


def test_sections_that_say_nothing_together_are_refused(home):
    for given in (
        {"instructions": {"prompt": "prompt"}},
        {"instructions": {"messages": "m", "prompt": "p", "completion": "c"}},
        {"instructions": {"messages": "m"}, "labels": {}},
        {"instructions": {"prompt": "p", "completion": "c", "chat_template": "t"}},
        {"instructions": {"messages": "m"}, "source": "text"},
        {"labels": {}, "source": "python-stdlib", "paths": ()},
    ):
        with pytest.raises(ValidationError):
            settings(home / "records.jsonl", **given)


@pytest.mark.parametrize("kind", ["messages", "labels"])
def test_killed_between_shards_it_ends_with_the_same_bytes(tmp_path, kind):
    path = write_records(tmp_path / "a.jsonl", [record(seed) for seed in range(600)])
    (tmp_path / "chat.jinja").write_text(CHATML)
    given = {
        "messages": {"instructions": {"messages": "messages", "chat_template": str(tmp_path / "chat.jinja")}},
        "labels": {"labels": {"text_pair_field": "pair"}},
    }[kind]
    data = settings(path, shard_tokens=4_000, engine="tokenizers", **given)
    undisturbed = prepare_dataset(data, TOKENIZER, tmp_path / "undisturbed")
    request = request_for(data, tmp_path)
    process = start(request, tmp_path)
    wait_until(lambda: len(list((tmp_path / "work").glob("*/records/train-*.json"))) >= 3)
    process.kill()
    process.communicate(timeout=30)
    assert not request.result_path.exists()
    assert contents(prepare_dataset(data, TOKENIZER, tmp_path / "work")) == contents(undisturbed)
    assert len(undisturbed.manifest.files) > 20


def test_both_engines_and_offsets_of_characters_give_the_same_ids_and_answers():
    texts = [CHATML, *(str(one) for one in RECORDS[:40]), *TRICKY_TEXTS]
    trained = Tokenizer.from_str(train_tokenizer(texts, vocab_size=400).json_text)
    trained.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    changes: list[dict[str, Any]] = [{}, {"normalizer": {"type": "Sequence", "normalizers": []}}]
    described = [json.dumps({**json.loads(trained.to_str()), **change}) for change in changes]
    plain, odd = (replace(load(text), bos_ids=()) for text in described)
    batch = [
        ["<|im_start|>user\n", "漢字 answer<|im_end|>", "\n", f"x<{BROKEN}|im_end|>", "y"],
        *([one] for one in TRICKY_TEXTS),
    ]
    batch += [["", f"a{BROKEN}b", "<|im_end|>"], ["é", "è"]]
    form = ExampleFormat(kind="messages", before=(), between=(0,), after=(0,))
    found = [
        [
            ([ids.tolist() for ids in texts], scored.tolist())
            for texts, scored, _ in ExampleEncoder(*of, form).encode(batch)
        ]
        for of in ((plain, "tokenizers"), (plain, "tiktoken"), (odd, "tokenizers"))
    ]
    assert found[0] == found[1] == found[2] and choose_engine(plain, "auto", []) == "tiktoken"
    (ids,), scored = found[0][0]
    learned = [i for i, one in zip(ids, scored, strict=True) if one]
    assert trained.decode(learned, skip_special_tokens=False) == "漢字 answer<|im_end|>x<|im_end|>"
    assert ids.count(trained.token_to_id("<|im_end|>")) == 1 and scored[0] == 0


def load(json_text: str) -> DocumentTokenizer:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.json").write_text(json_text)
        return load_tokenizer(directory)


def test_parquet_and_csv_hold_the_same_examples_as_json_lines(home, tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=30)
    with (tmp_path / "a.csv").open("w") as stream:
        writer = csv.DictWriter(stream, ["completion", "prompt", "text", "pair", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(RECORDS)
    template = ChatTemplate(CHATML, {}, ())
    sections: list[dict[str, Any]] = [
        {"instructions": {"messages": "messages"}},
        {"instructions": {"prompt": "prompt", "completion": "completion"}},
        {"labels": {"text_pair_field": "pair"}},
    ]
    for given, kinds in zip(sections, (["parquet"], ["parquet", "csv"], ["parquet", "csv"]), strict=True):
        found = []
        for path in (home / "records.jsonl", *(tmp_path / f"a.{kind}" for kind in kinds)):
            source = resolve_source(settings(path, source=path.suffix[1:], **given))
            reader = replace(source.records, template=template if "messages" in given.get("instructions", {}) else None)
            found.append(list(read_documents(replace(source, records=reader))))
        assert len(found[0]) == len(RECORDS) and all(one == found[0] for one in found)
