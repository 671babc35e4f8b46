"""Where documents go and where long ones are cut."""

import hashlib
import json
import re
import tracemalloc
from functools import partial
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_corpus import made_up_text

from relora_train.data import splitting
from relora_train.data.records import document_digest
from relora_train.data.sources import read_documents, resolve_source
from relora_train.data.splitting import PIECE_BYTES, cut_into_pieces, split_digest, split_of
from relora_train.data.staging import read_pieces, stage_documents
from relora_train.data.tokenizer import train_tokenizer
from relora_train.errors import DataError
from relora_train.settings.data import DataConfig


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.text(min_size=1), min_size=1, max_size=5), fraction=st.floats(0.01, 0.99))
def test_case_and_white_space_do_not_move_a_document_to_the_other_side(words, fraction):
    plain, shouted = " ".join(words), "\n\t ".join(words).lower()
    assert split_of(split_digest(plain), fraction) == split_of(split_digest(shouted), fraction)


def test_the_held_out_share_is_the_one_asked_for():
    held_out = sum(split_of(split_digest(f"document {n}"), 0.2) == "val" for n in range(10_000))
    assert abs(held_out - 2000) < 5 * 40  # five standard deviations of a binomial


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="a é漢👩\n ", max_size=300), limit=st.integers(4, 50))
def test_pieces_are_bounded_whole_characters_that_join_to_the_text(text, limit):
    pieces = list(cut_into_pieces(text, limit))
    assert b"".join(pieces) == text.encode()
    assert all(len(piece) <= limit and piece.decode() for piece in pieces if text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="aΣ'é漢 \n\u00a0", max_size=40), slice_bytes=st.integers(1, 9))
def test_a_long_text_is_on_the_side_and_in_the_pieces_that_reading_it_whole_gives(text, slice_bytes):
    whole = hashlib.blake2b(text.lower().encode().translate(None, b" \t\n\r\v\f"), digest_size=8)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(splitting, "PIECE_BYTES", slice_bytes)
        assert split_digest(text) == int.from_bytes(whole.digest(), "big")
    for piece, after in pairwise([*cut_into_pieces(text, 12), b""]):
        # up to the last single space among the bytes that fit, else up to the last whole character
        fits = text.encode()[text.encode().index(piece + after) :][:12].decode(errors="ignore")
        spaces = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", fits)]
        assert not after or piece.decode() == fits[: spaces[-1] if spaces else None]


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.text(alphabet="aΣİ'\u00ad漢 \n", max_size=9), min_size=1, max_size=4))
def test_an_example_is_on_the_side_of_its_parts_with_a_noncharacter_between(parts):
    assert split_digest(tuple(parts)) == split_digest("\ufdd0".join(parts))
    assert document_digest((*parts, "class"), "labels") == split_digest("\ufdd0".join(parts))


def test_an_example_is_staged_whole_and_in_parts(tmp_path):
    examples = [("ab", "", "漢"), ("d",), ("", "efghijk")]
    pieces = [[(part, n == len(one) - 1) for n, part in enumerate(one)] for one in examples]
    # 6 bytes of text in four parts, each counted with a separator, are 10
    for range_bytes, ranges in ((9, [(1, 5), (1, 1), (1, 7)]), (10, [(2, 6), (1, 7)])):
        place = tmp_path / str(range_bytes)
        staged = stage_documents(examples, place, lambda digest: "train", range_bytes=range_bytes, holds="messages")
        assert [(part.documents, part.text_bytes) for part in staged.ranges] == ranges
        assert [piece for part in staged.ranges for piece in read_pieces(place, part)] == [*chain.from_iterable(pieces)]


def test_a_long_line_is_held_twice_and_not_more(tmp_path):
    text = "\n".join(f"def line_{number}(x): return x" for number in range(100_000))
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}))
    source = resolve_source(DataConfig(source="jsonl", paths=(str(tmp_path / "one.jsonl"),)))
    tracemalloc.start()
    try:
        stage_documents(read_documents(source), tmp_path / "s", lambda digest: "train", range_bytes=1 << 23)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.6 * len(text)  # the line, and its text, which grows by a quarter at a time


def test_a_cut_document_has_the_ids_of_the_whole_one():
    text = " ".join(made_up_text(seed) for seed in range(2400))
    tokenizer = train_tokenizer([text], vocab_size=500).encoder()
    pieces = [piece.decode() for piece in cut_into_pieces(text, PIECE_BYTES)]
    assert len(pieces) > 3
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids] == whole


def test_duplicates_land_on_one_side_and_are_counted(tmp_path):
    texts = [made_up_text(seed % 50) for seed in range(150)]
    staged = stage_documents(
        ["", *texts], tmp_path / "s", partial(split_of, validation_fraction=0.3), range_bytes=10_000
    )
    assert (staged.empty_documents, staged.duplicate_documents) == (1, 100)
    sides = {"train": set(), "val": set()}
    for part in staged.ranges:
        sides[part.split] |= {text for text, _ in read_pieces(tmp_path / "s", part)}
    assert len(sides["train"]) + len(sides["val"]) == 50
    assert sides["train"].isdisjoint(sides["val"])


def test_duplicates_beyond_the_memory_are_estimated(tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "_COUNTED_DIGESTS", 1024)
    texts = [f"document {n}" for n in range(8000)]
    staged = stage_documents([*texts, *texts], tmp_path, side=lambda digest: "train", range_bytes=1 << 20)
    assert abs(staged.duplicate_documents - 8000) < 5 * 8000 / 500**0.5  # from a sample of 500 digests at least


def test_staged_text_that_was_damaged_is_not_tokenized(tmp_path):
    staged = stage_documents(["some text", "more text"], tmp_path / "s", lambda digest: "train", range_bytes=10_000)
    path = tmp_path / "s" / f"{staged.ranges[0].name}.text"
    path.write_bytes(path.read_bytes().replace(b"more", b"less"))
    with pytest.raises(DataError, match="was damaged"):
        list(read_pieces(tmp_path / "s", staged.ranges[0]))
