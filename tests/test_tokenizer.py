"""The tokenizer and its two engines: same ids, no forged separator."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from relora_train.data.engines import _GPT2_PATTERN, choose_engine, make_encoder, why_not_tiktoken
from relora_train.data.tokenizer import DocumentTokenizer, load_tokenizer, train_tokenizer
from relora_train.errors import TokenizerError

EOS = "<|endoftext|>"
TEXTS = [
    Path(__file__).read_text(),
    json.__doc__ or "",
    "naïve café — 漢字かな, 漢字かな; it's we'll they're 12,345.67\n\n",
] * 3


@pytest.fixture(scope="module")
def trained() -> DocumentTokenizer:
    return train_tokenizer(TEXTS, vocab_size=900)


@pytest.fixture(scope="module")
def engines(trained):
    return make_encoder(trained, "tokenizers"), make_encoder(trained, "tiktoken")


# Fragments that stand on the borders of the pattern: contractions, runs of space, specials, marks, other digits.
SPACES = (" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\x1c", "    return")
MARKS = ("é", "e\u0301", "漢", "½", "١", "\U0001f469\u200d\U0001f467", "\x00", "\ufeff", "'s", "'LL", "!=", "the")
tricky = st.sampled_from([EOS, "<|endof", *SPACES, *MARKS])
texts = st.lists(st.one_of(tricky, st.text(max_size=8)), max_size=30).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_both_engines_give_the_same_ids_for_any_text_and_never_the_separator(engines, trained, text):
    slow, fast = (engine([text])[0] for engine in engines)
    assert np.array_equal(slow, fast)
    assert trained.eos_id not in slow
    assert Tokenizer.from_str(trained.json_text).decode(slow.tolist()) == text


@pytest.mark.parametrize(
    "planes", [range(0x20000), pytest.param(range(0x20000, 0x110000), marks=pytest.mark.slow)], ids=["0-1", "2-16"]
)
def test_both_pattern_engines_put_every_character_in_the_same_class(planes):
    # A letter stays with "a", a digit with "1", a mark with "!", and white space with none of them.
    characters = [chr(c) for c in planes if not 0xD800 <= c < 0xE000]
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for start in range(0, len(characters), 50_000):
        pairs = [first + c for first in "a1!" for c in characters[start : start + 50_000]]
        ranks = {bytes([b]): b for b in range(256)}
        for pair in pairs:
            ranks.setdefault(pair.encode(), len(ranks))  # a piece that is a token is found whole
        encoding = tiktoken.Encoding("pairs", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        for pair in pairs:
            is_one_piece = len(encoding.encode_ordinary(pair)) == 1
            assert is_one_piece == (len(cutter.pre_tokenize_str(pair)) == 1), f"{pair!r}"


def test_training_gives_exactly_the_entries_asked_for_and_the_same_bytes_in_any_order(trained):
    assert trained.vocab_size == 900
    assert trained.json_text == train_tokenizer(reversed(TEXTS), vocab_size=900).json_text


def test_a_text_with_few_pairs_gives_a_smaller_tokenizer_and_says_so(caplog):
    assert train_tokenizer(["abab"], vocab_size=400).vocab_size < 300
    assert "no more pairs" in caplog.text


def test_a_saved_tokenizer_is_loaded_by_transformers_and_by_us(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == trained.eos_id
    assert theirs("it's text")["input_ids"] == make_encoder(trained, "tiktoken")(["it's text"])[0].tolist()
    assert load_tokenizer(str(tmp_path)) == load_tokenizer(str(tmp_path / "tokenizer.json")) == trained


def changed(tokenizer: DocumentTokenizer, directory: Path, change) -> str:
    description = json.loads(tokenizer.json_text)
    change(description)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(description))
    return str(path)


def test_a_tokenizer_that_adds_truncates_and_pads_does_none_of_it_to_documents(trained, tmp_path):
    tokenizer = Tokenizer.from_str(trained.json_text)
    tokenizer.post_processor = processors.TemplateProcessing(f"{EOS} $A {EOS}", None, [(EOS, trained.eos_id)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64, pad_token=EOS, pad_id=trained.eos_id)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    text = "a document of more than four tokens"
    for engine in ("tokenizers", "tiktoken"):
        expected = make_encoder(trained, engine)([text, "x"])
        found = make_encoder(loaded, engine)([text, "x"])
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


def test_a_separator_that_is_not_marked_special_cannot_be_forged_either(trained, tmp_path):
    path = changed(trained, tmp_path, lambda d: d["added_tokens"][0].update(special=False))
    loaded = load_tokenizer(path)
    for engine in ("tokenizers", "tiktoken"):
        assert loaded.eos_id not in make_encoder(loaded, engine)([f"a{EOS}b"])[0]
    assert choose_engine(loaded, "auto", []) == "tiktoken"


def test_a_tokenizer_whose_vocabulary_itself_forges_the_separator_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="could forge it"):
        load_tokenizer(str(tmp_path))


def test_the_separator_is_the_configured_one_or_a_usual_one_or_an_error(trained, tmp_path):
    tokenizer = Tokenizer.from_str(trained.json_text)
    tokenizer.add_special_tokens(["<|im_end|>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert load_tokenizer(str(tmp_path)).eos_token == EOS  # a chat model's own eos ends a turn, not a document
    assert load_tokenizer(str(tmp_path), eos_token="</s>").eos_id == 901
    with pytest.raises(TokenizerError, match="no token '<nope>'"):
        load_tokenizer(str(tmp_path), eos_token="<nope>")
    nameless = train_tokenizer(TEXTS, vocab_size=300, eos_token="<end>")
    nameless.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token == "<end>"  # from its tokenizer_config.json
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="usual end-of-text"):
        load_tokenizer(str(tmp_path))


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere/tokenizer\.json is no file"):
        load_tokenizer(str(tmp_path / "nowhere" / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json of .* cannot be read: .*Copy it again\. Name another"):
        load_tokenizer(str(tmp_path))


REFUSED = {
    "normalizer": lambda d: d.update(normalizer={"type": "NFC"}),
    "pre-tokenizer": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "plain ByteLevel": lambda d: d["pre_tokenizer"].update(use_regex=False),
    "dropout": lambda d: d["model"].update(dropout=0.5),
    "ignore_merges": lambda d: d["model"].update(ignore_merges=True),
    "out of order": lambda d: d["model"]["merges"].reverse(),
    "not special": lambda d: d["added_tokens"].append(
        {**d["added_tokens"][0], "id": d["model"]["vocab"]["the"], "content": "the", "special": False}
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_tiktoken_is_refused_where_its_ids_are_not_proven(trained, tmp_path, reason):
    loaded = load_tokenizer(changed(trained, tmp_path, REFUSED[reason]))
    assert reason in (why_not_tiktoken(loaded) or "")
    assert choose_engine(loaded, "auto", ["the end"]) == "tokenizers"
    with pytest.raises(TokenizerError, match="would not give this tokenizer's ids"):
        choose_engine(loaded, "tiktoken", [])


def test_a_vocabulary_on_which_the_engines_really_differ_is_refused():
    # "abc" is made of "ab" + "c", but "bc" merges first: `tokenizers` stops at a, bc, where tiktoken joins them.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([EOS, *alphabet, "bc", "ab", "abc"])}
    model = models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("ab", "c")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.add_special_tokens([EOS])
    crafted = DocumentTokenizer(tokenizer.to_str(), "{}", EOS, 0, len(vocabulary))
    slow, fast = (make_encoder(crafted, engine)(["abc"])[0].tolist() for engine in ("tokenizers", "tiktoken"))
    assert slow != fast
    assert why_not_tiktoken(crafted) == "its token 'abc' is not encoded as itself"
