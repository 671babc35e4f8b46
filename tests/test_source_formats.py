"""CSV, zstd and fields inside fields: the texts of every format, and errors that name file, row and part."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from relora_train.data.prepare import prepare_dataset
from relora_train.data.sources import read_documents, resolve_source
from relora_train.errors import SourceUnreadableError
from relora_train.settings.data import DataConfig, TokenizerConfig

TEXTS = ["one\n\ntwo\r\n", 'a "quoted", b', "naïve 漢字\u2028", "x" * 200_000, "", "last"]
NESTED = [{"meta": {"body": {"text": text}, "n": 1}} for text in TEXTS]


def resolve(source: str, path: Path, **settings):
    return resolve_source(DataConfig(source=source, paths=(str(path),), **settings))


def read(source: str, path: Path, **settings) -> list[str]:
    return list(read_documents(resolve(source, path, **settings)))


def write_csv(path: Path, texts=TEXTS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))
    return path


def write_lines(path: Path, rows=NESTED) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def test_a_csv_gives_its_column_row_by_row_also_across_lines_and_compressed(tmp_path):
    path = write_csv(tmp_path / "a.csv")
    content = path.read_bytes()
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + content + b"\r\n\r\n"))
    (tmp_path / "c.csv.zst").write_bytes(zstd(content))
    (tmp_path / "d.txt").write_text("no CSV")
    assert read("csv", tmp_path) == TEXTS * 3
    assert read("csv", path, text_field="id", max_documents=2) == ["0", "1"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("source", ["text", "jsonl", "csv"])
def test_all_bytes_of_a_compressed_source_are_told_as_they_are_read(tmp_path, source, ending):
    content = (write_csv if source == "csv" else write_lines)(tmp_path / "plain").read_bytes()
    path = tmp_path / f"a.{source}{ending}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd}[ending](content))
    told: list[int] = []
    found = resolve(source, path, text_field="text" if source == "csv" else "meta.body.text")
    texts = list(read_documents(found, told.append))
    assert texts == ([content.decode()] if source == "text" else TEXTS)
    assert sum(told) == found.size_bytes


CSV_FAULTS = {
    "row 2 (to line 4) has 3 fields, and the header has 2": b'id,text\n1,"a\nb"\n2,c,d\n',
    "has no column 'text' in its first row. It has: 'id', 'body'": b"id,body\n1,a\n",
    "has no column 'text' in its first row. It has: no header": b"",
    "after row 1 (line 3), is not valid CSV: unexpected end of data": b'id,text\n1,a\n2,"b\n',
    "line 3, is not UTF-8": b"id,text\n1,a\n2,\xff\n3,b\n",
}


@pytest.mark.parametrize("message", CSV_FAULTS)
def test_a_fault_in_a_csv_names_the_file_and_the_row_and_can_be_left_out(tmp_path, message):
    path = tmp_path / "a.csv"
    path.write_bytes(CSV_FAULTS[message])
    with pytest.raises(SourceUnreadableError) as error:
        read("csv", path)
    assert str(path) in str(error.value) and message in str(error.value)
    skipping = resolve("csv", path, unreadable="skip")
    is_record = message.startswith("row")
    assert list(read_documents(skipping)) == (["a\nb"] if is_record else [])
    assert [(fact["unit"], fact["count"]) for fact in skipping.left_out.facts()] == [
        ("records" if is_record else "files", 1)
    ]


def test_a_zstd_file_that_breaks_off_or_is_none_is_damaged_and_left_out_whole(tmp_path):
    whole = zstd(write_lines(tmp_path / "plain").read_bytes())
    for name, content in {"a": whole[:-3], "b": b"no zstd", "c": whole}.items():
        (tmp_path / f"{name}.jsonl.zst").write_bytes(content)
    with pytest.raises(SourceUnreadableError, match=r"a\.jsonl\.zst cannot be read: Truncated"):
        read("jsonl", tmp_path, text_field="meta.body.text")
    found = resolve("jsonl", tmp_path, text_field="meta.body.text", unreadable="skip")
    assert list(read_documents(found)) == TEXTS
    assert [(fact["reason"], fact["count"]) for fact in found.left_out.facts()] == [("damaged", 2)]


def test_a_field_inside_fields_is_the_same_text_in_every_format(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl")
    pq.write_table(pa.Table.from_pylist(NESTED), tmp_path / "a.parquet", row_group_size=2)
    assert read("jsonl", lines, text_field="meta.body.text") == TEXTS
    assert read("parquet", tmp_path / "a.parquet", text_field="meta.body.text") == TEXTS
    hub = DataConfig(source="hub", hub_id=str(tmp_path / "hub"), hub_revision="0" * 40, text_field="meta.body.text")
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist(NESTED), tmp_path / "hub" / "train-0.parquet")
    assert list(read_documents(resolve_source(hub))) == TEXTS


def test_a_field_that_is_called_by_a_name_with_dots_is_meant_first(tmp_path):
    row = {"meta.body": "dotted", "meta": {"body": "nested"}}
    assert read("jsonl", write_lines(tmp_path / "a.jsonl", [row]), text_field="meta.body") == ["dotted"]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert read("parquet", tmp_path / "a.parquet", text_field="meta.body") == ["dotted"]


def test_nulls_on_the_way_to_a_field_are_counted_nulls(tmp_path):
    rows = [{"meta": {"text": "a"}}, {"meta": None}, {"meta": {"text": None}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for source, path in (("jsonl", write_lines(tmp_path / "a.jsonl", rows)), ("parquet", tmp_path / "a.parquet")):
        found = resolve(source, path, text_field="meta.text")
        assert list(read_documents(found)) == ["a", "", ""]
        assert [(fact["reason"], fact["count"], fact["of"]) for fact in found.left_out.facts()] == [
            ("text is null", 2, 3)
        ]


@pytest.mark.parametrize(
    ("field", "message"),
    {
        "body.text": "has no field 'body.text'. It has: 'meta'.",
        "meta.test": "has no field 'meta.test'. 'meta' has: 'body', 'n'.",
        "meta.body.txt": "has no field 'meta.body.txt'. 'meta.body' has: 'text'.",
        "meta.n.text": "has no field 'meta.n.text'. 'meta.n' has: no fields.",
        "meta.body": ": the field 'meta.body' holds a dict, not text.",
    }.items(),
)
def test_a_field_that_is_not_there_is_named_with_the_part_that_lacks_it(tmp_path, field, message):
    pq.write_table(pa.Table.from_pylist(NESTED), tmp_path / "a.parquet")
    for source, path in (("jsonl", write_lines(tmp_path / "a.jsonl")), ("parquet", tmp_path / "a.parquet")):
        with pytest.raises(SourceUnreadableError) as error:
            read(source, path, text_field=field)
        assert message in str(error.value) and str(path) in str(error.value)
        assert source == "parquet" or "line 1" in str(error.value)


def test_nulls_are_in_the_manifest_and_change_no_id(tmp_path):
    rows = [{"text": f"document {number} " * 40} for number in range(40)] + [{"text": None}]
    data = DataConfig(source="jsonl", paths=(str(write_lines(tmp_path / "a.jsonl", rows)),), workers=1)
    made = prepare_dataset(data, TokenizerConfig(vocab_size=300), tmp_path / "work").manifest
    assert [(fact["reason"], fact["count"]) for fact in made.statistics["left_out"]] == [("text is null", 1)]
    assert made.statistics["empty_documents"] == 1 and "unreadable" not in made.inputs
