"""Documents from every source: the same texts, the same identity, and errors that name the place."""

import glob
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from relora_train.data.source_files import SourceFile, find_files, list_files
from relora_train.data.sources import read_documents, resolve_source
from relora_train.errors import SourceUnreadableError
from relora_train.settings.data import DataConfig
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store

TEXTS = ["one\n\ntwo\r\n", "", "naïve 漢字 👩‍👩‍👧", 'quotes " and \\ and \u2028 separators', "x" * 70_000]


def read(source: str, *paths: Path | str, **settings) -> list[str]:
    return list(read_documents(resolve(source, *paths, **settings)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))


def resolve(source: str, *paths: Path | str, **settings):
    data = DataConfig(source=source, paths=tuple(str(path) for path in paths), **settings)
    return resolve_source(data)


def write_jsonl(path: Path, texts=TEXTS, **extra) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text, **extra}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts=TEXTS) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=2)
    return path


def test_the_standard_library_is_real_code_without_tests_and_always_the_same():
    source = resolve_source(DataConfig())
    documents = list(read_documents(source))
    assert len(documents) > 500
    assert any("class JSONDecodeError" in text for text in documents)
    assert not any(part in ("test", "tests", "site-packages") for file in source.files for part in file.path.parts)
    assert resolve_source(DataConfig()).identity == source.identity


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "9.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    assert read("text", tmp_path) == [*TEXTS, TEXTS[0]]


def test_directories_globs_and_files_are_read_in_order_and_each_file_once(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.md", "b/1.txt", "a.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    assert read("text", tmp_path) == ["a.txt", "b/1.txt", "b/2.md"]
    assert read("text", tmp_path / "**" / "*.txt") == ["a.txt", "b/1.txt"]
    (tmp_path / "b-c").mkdir()
    (tmp_path / "b-c" / "d").write_text("b-c/d")
    # As identities of datasets have been since the first: a directory by its text, a glob by its parts.
    assert read("text", tmp_path) == ["a.txt", "b-c/d", "b/1.txt", "b/2.md"]
    assert read("text", tmp_path / "**") == ["a.txt", "b/1.txt", "b/2.md", "b-c/d"]
    (tmp_path / "b-c" / "d").unlink()
    assert read("text", tmp_path / "b" / "2.md", tmp_path) == ["b/2.md", "a.txt", "b/1.txt"]
    assert read("text", (tmp_path / "b").as_uri()) == ["b/1.txt", "b/2.md"]


@pytest.fixture
def ten_files(tmp_path: Path) -> Path:
    """Five texts in a folder, five in one below it."""
    root = tmp_path / "my-text"
    (root / "sub").mkdir(parents=True)
    for number in range(10):
        (root / ("sub" if number % 2 else ".") / f"{number}.txt").write_text(f"text {number}")
    return root


def test_links_multiply_no_corpus_and_leave_its_identity_alone(ten_files, tmp_path, caplog):
    """glob.glob finds 410 names here for each link to the folder itself."""
    patterns = [ten_files, ten_files / "**" / "*.txt", ten_files / "**"]
    before = [resolve("text", pattern).identity for pattern in patterns]
    assert [one["files"] for one in before] == [10, 10, 10]
    (ten_files / "0-loop").symlink_to(".")
    (ten_files / "sub" / "up").symlink_to("..")
    (ten_files / "00.txt").symlink_to("9.txt")  # nothing
    (ten_files / "000.txt").symlink_to("8.txt")
    (ten_files / "again").symlink_to(ten_files / "sub")
    caplog.clear()
    for pattern, identity in zip(patterns, before, strict=True):
        assert resolve("text", pattern).identity == identity
    assert resolve("text", ten_files / "*" / "*.txt").identity["files"] == 10  # its own five by way of 0-loop
    told = [record.message for record in caplog.records if "Links that lead to nothing" not in record.message]
    assert len(told) == 3, "once each, and the two patterns with ** leave out the same"
    assert "data.paths: 1 name left out, 10 files taken" in told[0] and "000.txt" in told[0]
    assert "data.paths: 4 names left out, 10 files taken" in told[1]


def test_links_of_which_nothing_is_taken_are_named(ten_files, tmp_path, caplog):
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "own.txt").write_text("text")
    (folder / "more").symlink_to(ten_files)
    (folder / "gone.txt").symlink_to("nowhere.txt")
    assert [file.name for file in list_files([str(folder)], "text")] == [str(folder / "own.txt")]
    assert f"{folder / 'more'} is a link to a directory, and not followed" in caplog.text
    assert f"lead to nothing are left out, 1 in all. The first: {folder / 'gone.txt'}" in caplog.text


def test_what_is_held_out_is_not_trained_on_too(tmp_path, caplog):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "copy.txt").write_text("text of a")
    source = resolve("text", tmp_path, validation_paths=(str(tmp_path / "a.txt"),))
    assert list(read_documents(source)) == ["text of b", "text of c"]
    assert "2 files of data.paths are held out by data.validation_paths" in caplog.text
    with pytest.raises(SourceUnreadableError, match="Leave some to train on"):
        resolve("text", tmp_path / "a.txt", validation_paths=(str(tmp_path / "copy.txt"),))


def test_a_path_that_is_named_twice_counts_once(ten_files, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("my-text")
    once = resolve("text", "my-text").identity
    everywhere = ("my-text", "./my-text", ten_files, ten_files.as_uri(), "link", "sub/../my-text/**/*.txt", "m*/*.txt")
    (tmp_path / "sub").mkdir()
    assert resolve("text", *everywhere).identity == once
    assert "data.paths: 55 names left out, 10 files taken. A file counts once" in caplog.records[-1].message


def test_links_that_lead_elsewhere_are_followed_by_globs(ten_files, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("more")
    (tmp_path / "more" / "back").symlink_to(ten_files)
    (ten_files / "3.txt").symlink_to(tmp_path / "more" / "a.txt")
    assert read("text", ten_files / "**" / "*.txt")[:4] == ["text 0", "text 2", "more", "text 4"]
    (ten_files / "3.txt").unlink()
    (ten_files / "disk-2").symlink_to(tmp_path / "more")
    assert len(read("text", ten_files / "**" / "*.txt")) == 11
    assert len(read("text", ten_files)) == 10, "a directory's links to folders are not followed"


def test_a_lattice_of_links_is_walked_in_no_time(tmp_path):
    """Two links to the next of 30 folders: 2^30 ways to the last one."""
    for number in range(30):
        (tmp_path / f"level-{number}").mkdir()
        for name in ("left", "right"):
            (tmp_path / f"level-{number}" / name).symlink_to(tmp_path / f"level-{number + 1}")
    (tmp_path / "level-30").mkdir()
    (tmp_path / "level-30" / "a.txt").write_text("a")
    assert read("text", tmp_path / "level-0" / "**" / "*.txt") == ["a"]


@pytest.mark.parametrize(
    "pattern",
    ["**", "**/*", "*/*", "*.txt", "**/a*", "a/**", "a/**/*.txt", "**/b/**/*.txt", "?/b/../*", "**/[!1].txt", "*/**"],
)
def test_without_links_a_pattern_finds_what_python_finds(tmp_path, pattern):
    for name in ("1.txt", "a/1.txt", "a/b/1.txt", "a/b/2.txt", "a/b/c/2.txt", "b/a1", ".h/1.txt", "a/.h/1.txt", "a/.1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {os.path.realpath(path) for path in glob.glob(f"{tmp_path}/{pattern}", recursive=True)}  # noqa: PTH207
    files = sorted(Path(path) for path in found if Path(path).is_file())
    try:
        names = [Path(file.identity) for file in list_files([f"{tmp_path}/{pattern}"], "text")]
    except SourceUnreadableError:
        names = []
    assert names == files


def test_a_folder_that_cannot_be_listed_is_named(ten_files, monkeypatch, caplog):
    """As root may list every folder, the system's answer is made up."""
    listed = os.scandir

    def denied(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert len(read("text", ten_files)) == 5
    assert f"{ten_files / 'sub'} cannot be listed (Permission denied): nothing in it is taken." in caplog.text


def test_json_lines_are_read_as_the_datasets_library_reads_them(tmp_path):
    import datasets

    path = write_jsonl(tmp_path / "a.jsonl")
    theirs = datasets.load_dataset("json", data_files=[str(path)], split="train", streaming=True)
    assert read("jsonl", path) == [row["text"] for row in theirs] == TEXTS


def test_compressed_and_parquet_files_give_the_same_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\n"))
    assert read("jsonl", tmp_path) == [*TEXTS, *TEXTS]
    assert read("parquet", write_parquet(tmp_path / "c.parquet")) == TEXTS


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_all_bytes_of_a_source_are_told_as_they_are_read(tmp_path, source):
    (tmp_path / "a.txt").write_text("text")
    found = resolve(source, {"text": tmp_path / "a.txt", "jsonl": write_jsonl(tmp_path / "a.jsonl"),
                             "parquet": write_parquet(tmp_path / "a.parquet")}[source])  # fmt: skip
    told: list[int] = []
    list(read_documents(found, told.append))
    assert sum(told) == found.size_bytes


def test_a_null_text_is_an_empty_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "b"}\n')
    assert read("jsonl", tmp_path / "a.jsonl") == read("parquet", write_parquet(tmp_path / "a.parquet", [None, "b"]))


def test_max_documents_ends_the_source(tmp_path):
    assert read("jsonl", write_jsonl(tmp_path / "a.jsonl"), max_documents=3) == TEXTS[:3]


def test_identity_is_content_not_place_and_changes_with_any_byte(tmp_path):
    (tmp_path / "here").mkdir()
    path = write_jsonl(tmp_path / "here" / "a.jsonl")
    first = resolve("jsonl", path).identity
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "a.jsonl"
    assert resolve("jsonl", tmp_path / "there").identity == first
    moved.write_bytes(moved.read_bytes() + b"\n")
    assert resolve("jsonl", moved).identity != first


def test_a_file_that_changes_after_it_was_hashed_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    source = resolve("jsonl", path)
    path.write_text('{"text": "other"}\n')
    with pytest.raises(SourceUnreadableError, match="changed while it was being prepared"):
        list(read_documents(source))


BROKEN_OFF = gzip.compress(os.urandom(10_000))[:5000]
FAULTS = {
    "line 2 is not valid JSON": ("jsonl", b'{"text": "a"}\n{"text": "b"\n'),
    "line 1 is not valid JSON": ("jsonl", b"[" * 100_000),
    "line 2 is not UTF-8": ("jsonl", b'{"text": "a"}\n{"text": "\xff"}\n'),
    "line 1 has no field 'text'. It has: 'id', 'body'": ("jsonl", b'{"id": 1, "body": "b"}\n'),
    "line 1: the field 'text' holds a int": ("jsonl", b'{"text": 3}\n'),
    "line 1 holds a JSON list": ("jsonl", b'[{"text": "a"}]\n'),
    "line 1: character 1 is half of a surrogate pair": ("jsonl", b'{"text": "a\\ud800"}\n'),
    "is not UTF-8 text: byte 2 (0xff)": ("text", b"ab\xff"),
    "is no parquet file": ("parquet", b"PAR1 but not really"),
    ".gz cannot be read": ("text", BROKEN_OFF, ".gz"),
    "use plain files, .gz or .zst": ("jsonl", b"", ".bz2"),
    "use plain files.": ("parquet", b"", ".zst"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_in_a_file_names_the_file_and_the_place(tmp_path, message):
    source, content, *ending = FAULTS[message]
    path = tmp_path / "".join([f"some-file.{source}", *ending])
    path.write_bytes(content)
    with pytest.raises(SourceUnreadableError) as error:
        read(source, path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_parquet_names_the_fields_there_are_and_a_column_that_is_no_text(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SourceUnreadableError, match=r"has no field 'body'\. It has: 'id', 'text'"):
        read("parquet", path, text_field="body")
    with pytest.raises(SourceUnreadableError, match="row 1: the field 'id' holds a int"):
        read("parquet", path, text_field="id")


def test_a_path_that_names_nothing_is_an_error(tmp_path):
    for path in (tmp_path / "nothing.txt", tmp_path / "*.txt", "memory://no-such/file.txt", "memory://no-such/*.txt"):
        with pytest.raises(SourceUnreadableError, match="names no file, directory, glob or prefix"):
            read("text", path)
    with pytest.raises(SourceUnreadableError, match=r"holds no file for source 'parquet' \(\.parquet\)"):
        read("parquet", tmp_path)


def test_a_store_gives_the_same_documents_and_identity_as_the_disk(tmp_path, caplog):
    store = MemoryStore.shared("sources-test")
    write_jsonl(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "b.jsonl", ["last"])
    for name in ("a", "b"):
        store.put_file(f"corpus/{name}.jsonl", tmp_path / f"{name}.jsonl")
    store.put_bytes("corpus/readme.md", b"not a document")
    on_disk = resolve("jsonl", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for path in ("corpus", "corpus/", "corpus/*.jsonl", "**/*.jsonl"):
        in_store = resolve("jsonl", f"memory://sources-test/{path}")
        assert in_store.identity == on_disk.identity
        assert list(read_documents(in_store)) == [*TEXTS, "last"]
    assert len(resolve("jsonl", "memory://sources-test/corpus/b.jsonl").files) == 1
    overlapping = [f"memory://sources-test/{path}" for path in ("corpus", "corpus/", "", "corpus/a.jsonl", "*/b.jsonl")]
    assert resolve("jsonl", *overlapping).identity == on_disk.identity
    assert "data.paths: 6 names left out, 2 files taken" in caplog.records[-1].message


def test_files_are_listed_before_any_is_read_or_fetched(tmp_path, monkeypatch):
    """So that a path that names nothing is found at once, whatever stands before it."""
    monkeypatch.setattr(MemoryStore, "get_file", None)
    monkeypatch.setattr(SourceFile, "of", None)
    MemoryStore.shared("listed-test").put_bytes("a.txt", b"a")
    (tmp_path / "a.txt").touch()
    there = [str(tmp_path / "a.txt"), "memory://listed-test/a.txt"]
    assert [file.name for file in list_files(there, "text")] == there
    with pytest.raises(SourceUnreadableError, match=r"nothing\.txt names no file"):
        find_files([*there, str(tmp_path / "nothing.txt")], "text")


def test_an_object_is_fetched_once_and_again_when_it_changed(tmp_path):
    store = MemoryStore.shared("sources-cache-test")
    store.put_bytes("a.txt", b"one")
    cached = resolve("text", "memory://sources-cache-test/a.txt").files[0]
    fetched_at = cached.path.stat().st_mtime_ns
    assert resolve("text", "memory://sources-cache-test/a.txt").files == (cached,)
    assert cached.path.stat().st_mtime_ns == fetched_at
    cached.path.write_bytes(b"damaged")
    assert read("text", "memory://sources-cache-test/a.txt") == ["one"]
    store.put_bytes("a.txt", b"two")
    assert read("text", "memory://sources-cache-test/a.txt") == ["two"]


def test_files_in_s3_are_documents(s3_store_uri, tmp_path):
    store = open_store(s3_store_uri)
    store.put_file("corpus/a.parquet", write_parquet(tmp_path / "a.parquet"))
    assert read("parquet", f"{s3_store_uri}/corpus") == TEXTS
    assert read("parquet", f"{s3_store_uri}/corpus/a.parquet") == TEXTS


def test_the_hub_without_a_network_is_a_clear_error():
    code = (
        "from relora_train.settings.profile import DataConfig; from relora_train.data.sources import *\n"
        "read_documents(resolve_source(DataConfig(source='hub', hub_id='some/corpus'))).__next__()"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 1
    assert "SourceUnreadableError: some/corpus cannot be read" in done.stderr
    assert "use source 'parquet' or 'jsonl'" in done.stderr


def test_a_full_commit_of_the_hub_is_an_identity_without_a_network():
    data = DataConfig(source="hub", hub_id="some/corpus", hub_revision="0123456789" * 4)
    assert resolve_source(data).identity["revision"] == data.hub_revision


def test_a_dataset_repository_is_streamed_row_by_row(tmp_path):
    # A repository on disk stands for one on the hub: the same loader, without the network.
    (tmp_path / "corpus").mkdir()
    write_parquet(tmp_path / "corpus" / "train-00000.parquet")
    data = DataConfig(source="hub", hub_id=str(tmp_path / "corpus"), hub_revision="0123456789" * 4)
    assert list(read_documents(resolve_source(data))) == TEXTS
    with pytest.raises(SourceUnreadableError, match=r"has no field 'body'\. It has: 'id', 'text'"):
        list(read_documents(resolve_source(data.model_copy(update={"text_field": "body"}))))
