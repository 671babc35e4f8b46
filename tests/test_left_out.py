"""With data.unreadable = "skip", what is no text is left out and counted; everything else is as without."""

import gzip
import json
import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up_corpus import made_up_text
from pydantic import ValidationError

from relora_train.data.left_out import left_out_note
from relora_train.data.prepare import describe_dataset, prepare_dataset
from relora_train.data.selection import Selection, contents_of, select_source
from relora_train.data.sources import read_documents, read_held_out, resolve_source
from relora_train.errors import CorpusEmptyError, CorpusTooSmallError, SourceUnreadableError
from relora_train.runs.datasets import prepare_or_reuse
from relora_train.runs.run import Run
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.profile import Profile, default_run_id

TOKENIZER = TokenizerConfig(vocab_size=300)
GOOD = [json.dumps({"text": made_up_text(seed)}).encode() for seed in range(60)]
BAD = {
    b'{"body": "b"}': "no field 'text'",
    b'{"text": 3}': "no text in 'text'",
    b'["text"]': "no JSON object",
    b'{"text": ': "not valid JSON",
    b'{"text": "\xff"}': "not UTF-8 text",
    b'{"text": "a\\ud800"}': "half of a surrogate pair",
}


def skipping(source: str, *paths: Path | str, **settings) -> DataConfig:
    settings = {"shard_tokens": 4_000, "validation_fraction": 0.2, "workers": 1, "unreadable": "skip", **settings}
    return DataConfig(source=source, paths=tuple(map(str, paths)), **settings)


def write_lines(path: Path, lines) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=300)
    return path


def read(data: DataConfig):
    source = resolve_source(data)
    return list(read_documents(source)), source.left_out.facts()


@pytest.fixture
def with_faults(tmp_path: Path) -> Path:
    """Sixty documents in two files, and a record of each bad kind between them; the first kind twice."""
    (tmp_path / "in").mkdir()
    first, *others = BAD
    write_lines(tmp_path / "in" / "a.jsonl", [*GOOD[:30], first, *others])
    write_lines(tmp_path / "in" / "b.jsonl", [first, *GOOD[30:]])
    return tmp_path / "in"


def test_each_bad_record_is_left_out_with_its_reason_and_first_place(with_faults):
    texts, facts = read(skipping("jsonl", with_faults))
    assert texts == [made_up_text(seed) for seed in range(60)]
    found = {fact["reason"]: (fact["count"], fact["of"], fact["unit"]) for fact in facts}
    assert found == {reason: (1 + (reason == "no field 'text'"), 67, "records") for reason in BAD.values()}
    first = {fact["reason"]: fact["first"] for fact in facts}
    assert first == {reason: f"{with_faults}/a.jsonl, line {31 + n}" for n, reason in enumerate(BAD.values())}


@pytest.mark.parametrize("unreadable", ["stop", "skip"])
def test_a_null_is_an_empty_document_that_is_counted_and_no_fault(tmp_path, unreadable):
    lines = [GOOD[0], b'{"text": null}', b"", b'{"text": null}', b'{"text": ""}']
    texts, facts = read(skipping("jsonl", write_lines(tmp_path / "a.jsonl", lines), unreadable=unreadable))
    assert texts == [made_up_text(0), "", "", ""]
    first = f"{tmp_path}/a.jsonl, line 2"
    assert facts == [{"unit": "records", "reason": "text is null", "count": 2, "of": 4, "first": first}]


def test_documents_are_counted_to_the_limit_without_what_is_left_out(with_faults):
    texts, facts = read(skipping("jsonl", with_faults, max_documents=31))
    assert texts == [made_up_text(seed) for seed in range(31)]
    assert {fact["of"] for fact in facts} == {38}
    assert read(skipping("jsonl", with_faults, max_documents=30)) == (texts[:30], [])  # it ends before the first fault


def test_files_that_are_no_text_are_left_out_whole(tmp_path):
    good = gzip.compress(b"good")
    contents = {"a.txt": b"one", "b.bin": b"a\xff", "c.gz": good, "d.gz": good[:-9], "e.gz": b"no gzip", "f.zip": b"PK"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    texts, facts = read(skipping("text", tmp_path))
    assert texts == ["one", "good"]
    assert left_out_note(facts) == (
        f"left out 1 of 6 files (not UTF-8 text; first: {tmp_path}/b.bin) and 2 of 6 files (damaged; first: "
        f"{tmp_path}/d.gz) and 1 of 6 files (compressed; first: {tmp_path}/f.zip)"
    )
    for name in ("d.gz", "e.gz"):
        with pytest.raises(SourceUnreadableError, match=rf"{name[0]}\.gz cannot be read.* data\.unreadable = \"skip\""):
            read(skipping("text", tmp_path / name, unreadable="stop"))


def test_lines_before_the_damage_are_left_out_with_the_rest(tmp_path):
    """However much of it a buffer lets through."""
    whole = gzip.compress(b"\n".join(GOOD * 20))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    write_lines(tmp_path / "b.jsonl", GOOD[:3])
    texts, facts = read(skipping("jsonl", tmp_path))
    assert len(texts) == 3
    assert [(fact["unit"], fact["count"], fact["of"]) for fact in facts] == [("files", 1, 2)]


def test_parquet_files_that_are_damaged_or_have_no_such_field_are_left_out_whole(tmp_path):
    raw = bytearray(write_parquet(tmp_path / "a.parquet", [made_up_text(n) for n in range(1200)]).read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 2000] = b"\xff" * 2000
    (tmp_path / "a.parquet").write_bytes(raw)
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but not really")
    pq.write_table(pa.table({"text": [1, None]}), tmp_path / "d.parquet")
    write_parquet(tmp_path / "e.parquet", ["good", "better"])
    texts, facts = read(skipping("parquet", tmp_path))
    assert texts == ["", "good", "better"]
    found = {(fact["unit"], fact["reason"], fact["count"], fact["of"], fact["first"][-14:]) for fact in facts}
    assert found == {
        ("records", "no text in 'text'", 1, 4, "parquet, row 1"),
        ("records", "text is null", 1, 4, "parquet, row 2"),
        ("files", "damaged", 1, 5, str(tmp_path / "a.parquet")[-14:]),
        ("files", "no field 'text'", 1, 5, str(tmp_path / "b.parquet")[-14:]),
        ("files", "no parquet file", 1, 5, str(tmp_path / "c.parquet")[-14:]),
    }
    stop = skipping("parquet", tmp_path / "a.parquet", unreadable="stop")
    with pytest.raises(SourceUnreadableError, match=r"cannot be read after row \d+: OSError: .*unreadable"):
        list(read_documents(resolve_source(stop)))


@pytest.mark.parametrize(("source", "name"), [("text", "a.txt"), ("text", "a.gz"), ("parquet", "a.parquet")])
def test_a_file_that_this_machine_cannot_open_still_stops(tmp_path, monkeypatch, source, name):
    """Another user, or the same one tomorrow, would make another dataset under the same id."""
    path = tmp_path / name
    path.write_bytes(b"x")
    found = resolve_source(skipping(source, path))
    path.unlink()
    # Root may open anything that is there, so the file is gone.
    monkeypatch.setattr(type(found.files[0]), "check_unchanged", lambda self: None)
    with pytest.raises(SourceUnreadableError, match="Let this user read it"):
        list(read_documents(found))


def test_reading_again_counts_nothing_twice_and_held_out_files_count_too(with_faults, tmp_path):
    held_out = write_lines(tmp_path / "held.jsonl", [*GOOD[:2], b"{"])
    source = resolve_source(skipping("jsonl", with_faults, validation_paths=(str(held_out),)))
    for _ in range(2):
        list(read_documents(source))
        list(read_held_out(source))
    facts = source.left_out.facts()
    assert {fact["reason"]: fact["count"] for fact in facts}["not valid JSON"] == 2
    assert sum(fact["count"] for fact in facts) == 8
    assert {fact["of"] for fact in facts} == {70}


def test_old_documents_of_a_selection_are_counted_with_the_new_ones(with_faults):
    source = resolve_source(skipping("jsonl", with_faults))
    new, old = (file.sha256 for file in source.files)
    assert {new, old} == set(contents_of(source))
    taken = select_source(source, Selection(new=(new,), old=(old,), old_ratio=0.5))
    list(taken.read(0.2))
    assert sum(fact["count"] for fact in source.left_out.facts()) == 7


def test_rows_of_both_revisions_of_a_repository_are_counted(tmp_path):
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"text": [1, 2, 3]}), tmp_path / "corpus" / "train-00000.parquet")
    old, new = "0" * 40, "1" * 40
    data = DataConfig(source="hub", hub_id=str(tmp_path / "corpus"), hub_revision=new, unreadable="skip")
    source = resolve_source(data)
    taken = select_source(source, Selection(new=(new,), old=(old,), old_ratio=0.5))
    assert list(taken.read(0.2)) == []
    assert [(fact["count"], fact["of"]) for fact in source.left_out.facts()] == [(6, 6)]


# The dataset


def test_the_dataset_is_that_of_the_good_records_with_counts_that_outlive_a_stop(with_faults, tmp_path, monkeypatch):
    data = skipping("jsonl", with_faults)
    good = write_lines(tmp_path / "good.jsonl", GOOD)
    plain = prepare_dataset(skipping("jsonl", good), TOKENIZER, tmp_path / "plain")
    assert "left_out" not in plain.manifest.statistics
    whole = prepare_dataset(data, TOKENIZER, tmp_path / "whole")
    assert whole.manifest.files == plain.manifest.files
    facts = whole.manifest.statistics["left_out"]
    assert sum(fact["count"] for fact in facts) == 7

    class Killed(BaseException):
        pass

    def killed(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("relora_train.data.prepare.write_shards", killed)
        with pytest.raises(Killed):
            prepare_dataset(data, TOKENIZER, tmp_path / "stopped")
        patch.undo()
        patch.setattr("relora_train.data.sources._parts", killed)  # it is staged: nothing is read again
        continued = prepare_dataset(data, TOKENIZER, tmp_path / "stopped")
    assert continued.manifest.files == whole.manifest.files
    assert continued.manifest.statistics["left_out"] == facts


def test_what_is_staged_twice_to_hold_a_document_out_is_counted_once(tmp_path):
    alike = [json.dumps({"text": made_up_text(seed) * 40}).encode() for seed in range(3)]
    data = skipping("jsonl", write_lines(tmp_path / "a.jsonl", [*alike, b"{"]), validation_fraction=0.0001)
    statistics = prepare_dataset(data, TOKENIZER, tmp_path).manifest.statistics
    assert "split_note" in statistics
    assert [(fact["count"], fact["of"]) for fact in statistics["left_out"]] == [(1, 4)]


def test_skipping_makes_another_dataset_and_run_and_the_default_the_same_as_ever(with_faults, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", GOOD)
    ids = {}
    for unreadable in ("stop", "skip"):
        data = skipping("jsonl", path, unreadable=unreadable)
        ids[unreadable], hashed = describe_dataset(data, TOKENIZER)
        assert hashed.get("unreadable") == (None if unreadable == "stop" else "skip")
    assert ids["stop"] != ids["skip"]
    runs = [
        Profile.model_validate({"data": {"source": "text", "paths": ["x"], **more}})
        for more in ({}, {"unreadable": "stop"}, {"unreadable": "skip"})
    ]
    names = [default_run_id(run) for run in runs]
    assert names[0] == names[1] != names[2]
    settings = runs[0].model_dump(mode="json")
    del settings["data"]["unreadable"]
    assert Profile.model_validate(settings) == runs[0]  # what was stored before


def test_sources_without_such_faults_take_no_such_setting():
    for source in ("python-stdlib", "digits"):
        with pytest.raises(ValidationError, match=f"source '{source}' takes no unreadable 'skip'"):
            DataConfig(source=source, unreadable="skip")


def test_where_nothing_is_left_the_error_says_what_was_left_out(tmp_path):
    bad = write_lines(tmp_path / "a.jsonl", BAD)
    with pytest.raises(CorpusEmptyError, match=r"0 empty documents, and left out 1 of 6 records \(not valid JSON"):
        prepare_dataset(skipping("jsonl", bad), TOKENIZER, tmp_path / "w")
    one = write_lines(tmp_path / "a.jsonl", [*GOOD[:1] * 30, b"{"])
    with pytest.raises(CorpusTooSmallError, match=r"left out 1 of 31 records"):
        prepare_dataset(skipping("jsonl", one), TOKENIZER, tmp_path / "w")


def test_a_run_tells_once_what_was_left_out(with_faults, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="relora_train")
    shutil.copy(write_lines(tmp_path / "x", [*GOOD, b'{"text": 3}']), with_faults / "c.jsonl")
    for name in ("a", "b"):
        (with_faults / f"{name}.jsonl").unlink()
    data = skipping("jsonl", with_faults).model_dump(mode="json")
    profile = Profile.model_validate({"data": data, "tokenizer": {"vocab_size": 300}})
    run = Run("r", "memory://left-out", profile)
    for _ in range(2):
        prepare_or_reuse(run, on_event=lambda event: None)
    told = [record for record in caplog.records if "left out" in record.message]
    assert [record.levelname for record in told] == ["WARNING"]
    assert told[0].message.endswith(
        f"left out 1 of 61 records (no text in 'text'; first: {with_faults}/c.jsonl, line 61)."
    )
