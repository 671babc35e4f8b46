"""Documents from any source: a stream of texts in a fixed order, and the identity of what they came from.

Identity is content: the SHA-256 of every file in order, or a hub revision; never a path. Text, JSON lines and CSV are
read here, one file or record at a time; parquet and hub datasets through `datasets`, streamed. Memory is bounded by the
longest document. Light until parquet, .zst or the hub is read.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, Any

from relora_train.data.hf_sources import hub_rows, parquet_rows, resolve_hub_revision
from relora_train.data.left_out import NULL, Fault, LeftOut
from relora_train.data.python_sources import package_files, reinstall, stdlib_files
from relora_train.data.records import Document, RecordReader
from relora_train.data.source_files import SourceFile, check_compression, find_files, warn_once
from relora_train.errors import SourceUnreadableError
from relora_train.settings.data import DataConfig

Located = Iterator[tuple[str, Document | Fault]]
"""Documents, each with its place, and what is found in place of one."""

Advance = Callable[[int], None]
"""Told how many bytes of the source were read since the last call."""


@dataclass(frozen=True)
class Source:
    """A corpus that was found and hashed, ready to be read."""

    data: DataConfig
    identity: dict[str, Any]
    """The content of the documents, whatever they are called and wherever they lie."""

    files: tuple[SourceFile, ...]
    """On this machine's disk; empty for a hub dataset."""

    revision: str = ""
    """Commit of a hub dataset."""

    held_out: tuple[SourceFile, ...] = ()
    """The files of data.validation_paths."""

    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    """Filled as the source, or a part of it, is read."""

    records: RecordReader = field(default_factory=lambda: RecordReader(DataConfig()), compare=False)
    """The way from a record to a document."""

    @property
    def size_bytes(self) -> int | None:
        """Bytes that reading will go through; None where that is unknown beforehand."""
        return sum(file.size_bytes for file in self.files) if self.files and self.data.max_documents is None else None


def resolve_source(data: DataConfig) -> Source:
    """Find and hash everything the settings name; files in a store are fetched to the cache first.

    Raises SourceUnreadableError for what is missing or not data.content_sha256, and what the store raises.
    """
    if data.source == "hub":
        revision = resolve_hub_revision(data)
        names = {"hub_id": data.hub_id, "config": data.hub_config, "split": data.hub_split}
        identity = {"format": "hub", **names, "revision": revision}
        return Source(data, identity, (), revision, records=RecordReader(data))
    find = partial(find_files, kind=data.source, skip=data.unreadable == "skip")
    files = find(data.paths) if data.paths else package_files(data.packages) if data.packages else stdlib_files()
    held_out: tuple[SourceFile, ...] = ()
    if data.validation_paths:
        try:
            held_out = tuple(find(data.validation_paths))
        except SourceUnreadableError as error:
            raise SourceUnreadableError(str(error).replace("data.paths", "data.validation_paths")) from None
        held = {file.sha256 for file in held_out}  # a score on text that was trained on says nothing
        both = [file.name for file in files if file.sha256 in held]
        files = [file for file in files if file.sha256 not in held]
        if both and not files:
            raise SourceUnreadableError("data.validation_paths name every file of data.paths. Leave some to train on.")
        if both:
            say = f"{len(both)} files of data.paths are held out by data.validation_paths, not trained on: {both[0]}"
            warn_once(say)
    check_content(data, [*files, *held_out])
    return Source(data, identify(data.source, files), tuple(files), held_out=held_out, records=RecordReader(data))


def identify(kind: str, files: Sequence[SourceFile]) -> dict[str, Any]:
    """Return the identity of the documents in files: their content in this order."""
    content = hashlib.sha256("".join(file.sha256 for file in files).encode())
    return {
        "format": kind,
        "files": len(files),
        "size_bytes": sum(file.size_bytes for file in files),
        "content_sha256": content.hexdigest(),
    }


def check_content(data: DataConfig, files: Sequence[SourceFile]) -> None:
    """Return only if all files of a source together are what data.content_sha256 pins, where it pins anything."""
    found = identify(data.source, files)
    if data.content_sha256 not in ("", found["content_sha256"]):
        remedy = f"Run: {reinstall(data.packages)}" if data.packages else "Put the pinned files back"
        raise SourceUnreadableError(
            f"Dataset {data.name!r} is of other content than it was pinned to: source {data.source!r} has "
            f"{found['files']:,} files, {found['size_bytes']:,} bytes, SHA-256 {found['content_sha256']}, and "
            f"data.content_sha256 is {data.content_sha256}. Results would not compare. {remedy}. To train on it "
            'all the same, set data.content_sha256 to what it has, or to "".'
        )


def read_documents(source: Source, advance: Advance = lambda size: None) -> Iterator[Document]:
    """Yield the texts of the source in order, at most max_documents of them. A null text is '', and counted.

    Every text can be encoded as UTF-8. A fault is counted too where data.unreadable is 'skip', and otherwise
    raises SourceUnreadableError, with the file and the line, row or byte.
    """
    data, given = source.data, 0
    for name, documents in _parts(source, advance):
        tally = source.left_out.begin(name)
        for where, found in documents:
            if found is NULL:
                tally.add(NULL, where)
                found = ""
            elif isinstance(found, Fault):
                if data.unreadable == "stop":
                    raise found.as_error()
                tally.add(found, where)
                continue
            else:
                tally.records += 1
            yield found
            given += 1
            if given == data.max_documents:
                return


def read_held_out(source: Source) -> Iterator[Document]:
    """Return the texts of data.validation_paths, all of them, as read_documents."""
    data = source.data.model_copy(update={"max_documents": None})
    return read_documents(replace(source, data=data, files=source.held_out))


def _parts(source: Source, advance: Advance) -> Iterator[tuple[str, Located]]:
    if source.data.source == "hub":
        name = f"{source.data.hub_id}@{source.revision}"
        yield name, hub_rows(source.data, source.records, source.revision, advance)
    for file in source.files:
        file.check_unchanged()
        yield file.name, _documents_or_fault(file, source, advance)


def _documents_or_fault(file: SourceFile, source: Source, advance: Advance) -> Located:
    """Yield the documents of a file; if it is no text, the one fault that says so, first or, to stop there, later."""
    data, records = source.data, source.records
    documents = {"jsonl": _json_lines, "csv": _csv_rows, "parquet": parquet_rows}.get(data.source, _whole_text)
    try:
        check_compression(file.name, data.source)
        compressed = file.name.endswith((".gz", ".zst"))
        may_break_off = data.source in ("parquet", "csv") or (data.source == "jsonl" and compressed)
        if data.unreadable == "skip" and may_break_off:
            # A file that breaks off is left out whole: how much of it can be read depends on sizes of buffers.
            deque(documents(file, records, lambda size: None), maxlen=0)
        yield from documents(file, records, advance)
    except Fault as fault:
        yield file.name, fault


def _whole_text(file: SourceFile, records: RecordReader, advance: Advance) -> Located:
    with _opened(file) as (stream, _):
        raw = stream.read()
    # Some modules of the standard library are in another encoding on purpose.
    errors = "strict" if records.data.source == "text" else "replace"
    try:
        text = raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise Fault(
            f"{file.name} is not UTF-8 text: byte {error.start} ({raw[error.start]:#04x}) cannot be decoded. "
            "Convert it to UTF-8, or leave it out of data.paths.",
            "not UTF-8 text",
            "files",
        ) from None
    yield file.name, text
    advance(file.size_bytes)


def _json_lines(file: SourceFile, records: RecordReader, advance: Advance) -> Located:
    """Yield one document a line, as `datasets` reads JSON lines, but with the line's number in every error."""
    told = number = 0
    with _opened(file) as (stream, disk):
        while line := stream.readline():
            number += 1
            advance(disk.tell() - told)
            told = disk.tell()
            where, content = f"{file.name}, line {number}", [line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")]
            del line
            if content[0] and not content[0].isspace():
                yield where, _document_in(content, records, where)


def _document_in(content: list[bytes], records: RecordReader, where: str) -> Document | Fault:
    """Take the line out of its list, so that no more than two copies of a long one are held at a time."""
    try:
        decoded = content.pop().decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = "Repair or remove the line."
        return Fault(f"{where} is not UTF-8: {error.reason} at byte {error.start}. {remedy}", "not UTF-8 text")
    try:
        row = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return Fault(f"{where} is not valid JSON: {error}. Repair or remove the line.", "not valid JSON")
    if not isinstance(row, dict):
        name = next(iter(records.fields))
        found = f"{where} holds a JSON {type(row).__name__}, not an object with the field {name!r}."
        return Fault(f"{found} Write one object a line.", "no JSON object")
    return records.read(row, where)


def _csv_rows(file: SourceFile, records: RecordReader, advance: Advance) -> Located:
    """Yield the field of each row below the header; a blank line is no row. Raises Fault if the file is no CSV."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit is 128 KiB, less than many documents
    told = number = 0
    with _opened(file) as (stream, disk):
        rows = csv.reader(_decoded(stream, file.name), strict=True)
        try:
            header = next(rows, [])
            for name, setting in records.fields.items():
                if name not in header:
                    there = ", ".join(map(repr, header)) or "no header"
                    what = f"{file.name} has no column {name!r} in its first row. It has: {there}."
                    raise Fault(f"{what} Name the right one in {setting}.", f"no column {name!r}", "files")
            for number, row in enumerate(filter(None, rows), start=1):
                advance(disk.tell() - told)
                told = disk.tell()
                where = f"{file.name}, row {number} (to line {rows.line_num})"
                if len(row) == len(header):  # of two columns with one name, the first is meant
                    yield where, records.read(dict(zip(header[::-1], row[::-1], strict=True)), where)
                else:
                    what = f"{where} has {len(row)} fields, and the header has {len(header)}. Repair or remove the row."
                    yield where, Fault(what, "another number of fields")
        except csv.Error as error:
            what = (
                f"{file.name}, after row {number} (line {rows.line_num}), is not valid CSV: {error}. Repair the file."
            )
            raise Fault(what, "not valid CSV", "files") from None


def _decoded(stream: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        try:
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            what = (
                f"{name}, line {number}, is not UTF-8: {error.reason} at byte {error.start}. Convert the file to UTF-8."
            )
            raise Fault(what, "not UTF-8 text", "files") from None


@contextmanager
def _opened(file: SourceFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file: its content, decompressed, and the file on disk, whose position tells how much was read."""
    try:
        with file.path.open("rb") as disk:
            if file.name.endswith(".gz"):
                with gzip.GzipFile(fileobj=disk) as stream:
                    yield stream, disk  # type: ignore[misc]  # a GzipFile is read like any binary file
            elif file.name.endswith(".zst"):
                import pyarrow

                with io.BufferedReader(pyarrow.CompressedInputStream(disk, "zstd")) as stream:
                    yield stream, disk
            else:
                yield disk, disk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Fault(f"{file.name} cannot be read: {error}. Repair it.", "damaged", "files") from error
    except OSError as error:
        if file.name.endswith(".zst") and error.errno is None:  # so pyarrow tells that the content is damaged
            raise Fault(f"{file.name} cannot be read: {error}. Repair it.", "damaged", "files") from error
        raise SourceUnreadableError(f"{file.name} cannot be read: {error}. Let this user read it.") from error
