"""Examples that nothing can be learned from are named with file and record, in one message, before anything is made."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from instructions import CHATML, record, write_records
from pydantic import ValidationError
from stage_runs import tiny_profile
from test_instructions import examples_of
from tokenizers import Tokenizer

from relora_train.data.prepare import describe_dataset, prepare_dataset
from relora_train.data.selection import template_of
from relora_train.data.sources import Source, read_documents, resolve_source
from relora_train.errors import CorpusEmptyError, DataError, SourceUnreadableError, TokenizerError
from relora_train.settings.data import DataConfig, TokenizerConfig

TOKENIZER = TokenizerConfig(vocab_size=300)
USER, ASSISTANT = {"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}
GOOD = [record(seed) for seed in range(40)]


def settings(path: Path, **given: Any) -> DataConfig:
    return DataConfig(**{"source": "jsonl", "paths": (str(path),), "validation_fraction": 0.2, "workers": 1, **given})


def instructions(tmp_path: Path, template: str = CHATML) -> dict[str, Any]:
    (tmp_path / "chat.jinja").write_text(template)
    return {"instructions": {"messages": "messages", "chat_template": str(tmp_path / "chat.jinja")}}


NO_PREFIX = "{% for m in messages %}{{ loop.length }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
FAILING = "{% if messages[0].content == 'fail' %}{{ raise_exception('no') }}{% endif %}" + CHATML
ENDING = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
MARKS_NONE = "{% generation %}{% endgeneration %}" + CHATML

# ruff: noqa: E501, RUF043  # one case a line
CONVERSATIONS: dict[str, tuple[Any, str, str]] = {
    "no list": ("alpha", "the messages are a str, not a list", "no list of messages"),
    "an empty list": ([], "the messages are an empty list", "no list of messages"),
    "an unknown role": ([USER, {"role": "bot", "content": "b"}], ", message 2 has role 'bot'. Roles are", "an unknown role"),
    "no role": ([{"from": "human", "value": "a"}], ", message 1 has no role", "an unknown role"),
    "no message": (["alpha"], ", message 1 has no role", "an unknown role"),
    "an empty answer": ([USER, {"role": "assistant", "content": " "}], ", message 2: the answer is empty", "an empty answer"),
    "a null answer": ([USER, {"role": "assistant", "content": None}], ", message 2: the answer is empty", "an empty answer"),
    "no answer": ([USER], "has no message of the assistant", "no answer"),
    "parts": ([USER, {"role": "assistant", "content": [{"type": "text"}]}], ": its content is a list", "content that is no text"),
    "a failing template": ([{"role": "user", "content": "fail"}, ASSISTANT], "the chat template fails", "the chat template fails"),
    "half a pair": ([USER, {"role": "assistant", "content": "\ud800"}], "surrogate", "half of a surrogate pair"),
    "a noncharacter": ([USER, {"role": "assistant", "content": "a\ufdd0"}], "U\\+FDD0", "a noncharacter"),
    "the other": ([USER, {"role": "assistant", "content": "a\ufdd1"}], "U\\+FDD1", "a noncharacter"),
}  # fmt: skip

LABELLED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no field": ({"text": "a", "pair": "b"}, "has no field 'label'.* in data.labels.field", "no field 'label'"),
    "null": ({"text": "a", "pair": "b", "label": None}, "has no class in 'label'", "no class"),
    "empty": ({"text": "a", "pair": "b", "label": ""}, "has no class in 'label'", "no class"),
    "a number": ({"text": "a", "pair": "b", "label": 0.5}, "the class in 'label' is a float", "no class in 'label'"),
    "a truth": ({"text": "a", "pair": "b", "label": True}, "the class in 'label' is a bool", "no class in 'label'"),
    "no pair": ({"text": "a", "label": "a"}, "has no field 'pair'.* in data.labels.text_pair_field", "no field 'pair'"),
    "a text": ({"text": 3, "pair": "b", "label": "a"}, "the field 'text' holds a int", "no text in 'text'"),
}

PROMPTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty": ({"prompt": "a", "completion": " \n"}, "the completion is empty", "an empty answer"),
    "null": ({"prompt": "a", "completion": None}, "the completion is empty", "an empty answer"),
    "no text": (
        {"prompt": "a", "completion": 1},
        "'completion' holds a int.*data.instructions.completion",
        "no text in",
    ),
    "no field": ({"completion": "a"}, "no field 'prompt'.* in data.instructions.prompt", "no field 'prompt'"),
}

CASES = [
    *((f"messages, {name}", {**GOOD[0], "messages": messages}, *rest) for name, (messages, *rest) in CONVERSATIONS.items()),
    *((f"labels, {name}", *rest) for name, rest in LABELLED.items()),
    *((f"prompts, {name}", *rest) for name, rest in PROMPTS.items()),
]  # fmt: skip


def sections(kind: str, tmp_path: Path) -> dict[str, Any]:
    if kind == "labels":
        return {"labels": {"text_pair_field": "pair"}}
    if kind == "prompts":
        return {"instructions": {"prompt": "prompt", "completion": "completion"}}
    return instructions(tmp_path, FAILING)


@pytest.mark.parametrize(("case", "bad", "message", "reason"), CASES, ids=[case[0] for case in CASES])
def test_a_bad_record_is_named_and_with_skip_left_out_and_counted(
    tmp_path: Path, case: str, bad: Any, message: str, reason: str
):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [GOOD[0], bad, GOOD[1]]))
    given = sections(case.partition(",")[0], tmp_path)
    with pytest.raises(SourceUnreadableError, match=rf"a\.jsonl, line 2.*{message}") as caught:
        prepare_dataset(settings(path, **given), TOKENIZER, tmp_path / "work")
    assert "\n" not in str(caught.value) and 'data.unreadable = "skip"' in str(caught.value)
    assert not list((tmp_path / "work").rglob("*.bin")) and not list((tmp_path / "work").rglob("prepared.json"))
    source, documents = read(settings(path, unreadable="skip", **given))
    assert len(documents) == 2
    (fact,) = source.left_out.facts()
    assert (fact["count"], fact["of"], fact["first"]) == (1, 3, f"{path}, line 2") and reason in fact["reason"]


def read(data: DataConfig) -> tuple[Source, list[str]]:
    source = resolve_source(data)
    source = replace(source, records=replace(source.records, template=template_of(data, None, TOKENIZER)))
    return source, list(read_documents(source))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            NO_PREFIX,
            "a.jsonl, line 1: the chat template writes message [0-9], an answer, differently .*{% generation %}",
        ),
        (MARKS_NONE, "a.jsonl, line 1: the chat template marks no answer"),
        ("{% for", "a.jsonl, line 1: the chat template fails on this conversation: TemplateSyntaxError"),
        ("", "need a chat template"),
    ],
)
def test_a_template_that_cannot_tell_answers_is_refused(tmp_path: Path, template: str, message: str):
    path = write_records(tmp_path / "a.jsonl", [record(3), *GOOD])
    with pytest.raises(DataError, match=message):
        prepare_dataset(settings(path, **instructions(tmp_path, template)), TOKENIZER, tmp_path / "work")
    assert not list((tmp_path / "work").rglob("*.bin"))


def test_a_missing_template_is_named_before_the_source_is_read(tmp_path: Path):
    path = write_records(tmp_path / "a.jsonl", [{"messages": 1}])
    with pytest.raises(TokenizerError, match=r"data\.instructions\.chat_template .*none\.jinja cannot be read"):
        describe_dataset(
            settings(path, instructions={"messages": "messages", "chat_template": str(tmp_path / "none.jinja")}),
            TOKENIZER,
        )
    with pytest.raises(
        TokenizerError, match="a tokenizer that is trained here has none.*data.instructions.chat_template"
    ):
        describe_dataset(settings(path, instructions={"messages": "messages"}), TOKENIZER)


def test_a_class_that_only_held_out_texts_have_is_named_with_its_first_place(tmp_path: Path):
    train = write_records(tmp_path / "train.jsonl", GOOD)
    held_out = write_records(tmp_path / "val.jsonl", [GOOD[1], {**GOOD[0], "label": "z"}, {**GOOD[2], "label": "z"}])
    data = settings(train, validation_paths=(str(held_out),), labels={})
    for _ in range(2):  # also where the texts are staged already
        with pytest.raises(
            DataError, match=r"Class 'z' \(2 texts, the first in .*val\.jsonl, line 2\) is held out whole"
        ):
            prepare_dataset(data, TOKENIZER, tmp_path / "work")
    assert not list((tmp_path / "work").rglob("*.bin"))


def test_columns_that_are_not_there_are_named_with_their_setting(tmp_path: Path):
    pq.write_table(pa.table({"text": ["a"], "class": [1]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,class\na,1\n")
    for kind in ("csv", "parquet"):
        data = settings(tmp_path / f"a.{kind}", source=kind, labels={})
        with pytest.raises(SourceUnreadableError, match=rf"a\.{kind} has no .*'label'.* in data\.labels\.field"):
            prepare_dataset(data, TOKENIZER, tmp_path / "work")


def test_where_no_conversation_is_left_the_error_says_why(tmp_path: Path):
    path = write_records(tmp_path / "a.jsonl", [{"messages": [USER]}] * 3)
    data = settings(path, unreadable="skip", **instructions(tmp_path))
    with pytest.raises(CorpusEmptyError, match="left out 3 of 3 records .no answer; first: .*line 1"):
        prepare_dataset(data, TOKENIZER, tmp_path / "work")


def test_settings_that_an_objective_cannot_learn_from_are_refused(tmp_path: Path):
    given = {"source": "jsonl", "paths": ("a.jsonl",)}
    for data, batch, message in (
        ({"labels": {}}, {}, "'causal_lm' does not learn from data.labels; it takes whole texts or"),
        ({"instructions": {"messages": "m"}}, {}, "set batch.documents to 'mask'"),
        ({"instructions": {"prompt": "p", "completion": "c"}}, {}, "set batch.documents to 'mask'"),
    ):
        with pytest.raises(ValidationError, match=message):
            tiny_profile(data={**given, **data}, batch=batch)
    tiny_profile(data={**given, "instructions": {"messages": "m"}}, batch={"documents": "mask"})
    with pytest.raises(ValidationError, match="'masked_lm' does not learn from data.instructions.messages"):
        tiny_profile(objective="masked_lm", data={**given, "instructions": {"messages": "m"}})


def test_the_name_of_a_special_token_in_a_message_is_read_as_its_characters(tmp_path: Path):
    forged = "alpha <|endoftext|> beta"
    conversation = [{"role": "user", "content": forged}, {"role": "assistant", "content": f"{forged}{forged}"}]
    path = write_records(tmp_path / "a.jsonl", [*GOOD, *({"messages": conversation} for _ in range(30))])
    made = prepare_dataset(settings(path, **instructions(tmp_path, ENDING)), TOKENIZER, tmp_path / "work")
    tokenizer = Tokenizer.from_file(str(made.directory / "tokenizer.json"))
    examples = examples_of(made, "train") + examples_of(made, "val")
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids, _ in examples]
    found = [ids for (ids, _), text in zip(examples, texts, strict=True) if "alpha <|endo" in text]
    assert len(found) == 30 and all(
        ids.count(made.manifest.eos_id) == 1 and ids[-1] == made.manifest.eos_id for ids in found
    )
    learned = [
        tokenizer.decode([i for i, one in zip(ids, scored, strict=True) if one], skip_special_tokens=False)
        for ids, scored in examples
    ]
    assert learned.count(f"{forged}{forged}<|im_end|>\n<|endoftext|>") == 30
