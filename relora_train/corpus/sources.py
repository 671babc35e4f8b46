"""Documents from any source: a stream of texts in a fixed order, and the identity of what they came from.

Identity is content: the SHA-256 of every file in order, or a hub revision; never a path. Text and JSON lines are read
here, one file or line at a time; parquet and hub datasets through `datasets`, streamed. Memory is bounded by the
longest document. Light until parquet or the hub is read.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from relora_train.corpus.hf_sources import hub_rows, parquet_rows, resolve_hub_revision
from relora_train.corpus.source_files import SourceFile, find_files
from relora_train.errors import SourceUnreadableError
from relora_train.settings.data import DataConfig

Advance = Callable[[int], None]
"""Told how many bytes of the source were read since the last call."""

_GENERATED_TABLES = {"encodings", "pydoc_data"}  # an eighth of the library, and not how people write Python
_NOT_TRAINING_TEXT = _GENERATED_TABLES | {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A corpus that was found and hashed, ready to be read."""

    data: DataConfig
    identity: dict[str, Any]
    """What the documents are, whatever they are called and wherever they lie."""

    files: tuple[SourceFile, ...]
    """On this machine's disk; empty for a hub dataset."""

    revision: str = ""
    """Commit of a hub dataset."""

    held_out: tuple[SourceFile, ...] = ()
    """The files of data.validation_paths."""

    @property
    def size_bytes(self) -> int | None:
        """Bytes that reading will go through; None where that is unknown beforehand."""
        return sum(file.size_bytes for file in self.files) if self.files and self.data.max_documents is None else None


def resolve_source(data: DataConfig, cache_directory: Path | None = None) -> Source:
    """Find and hash everything the settings name; files in a store are fetched to the cache first.

    Raises SourceUnreadableError for what is missing, and what the store raises.
    """
    if data.source == "hub":
        revision = resolve_hub_revision(data)
        names = {"hub_id": data.hub_id, "config": data.hub_config, "split": data.hub_split}
        return Source(data, {"format": "hub", **names, "revision": revision}, (), revision)
    files = _stdlib_files() if data.source == "python-stdlib" else find_files(data.paths, data.source, cache_directory)
    held_out: tuple[SourceFile, ...] = ()
    if data.validation_paths:
        try:
            held_out = tuple(find_files(data.validation_paths, data.source, cache_directory))
        except SourceUnreadableError as error:
            raise SourceUnreadableError(str(error).replace("data.paths", "data.validation_paths")) from None
    return Source(data, identify(data.source, files), tuple(files), held_out=held_out)


def identify(kind: str, files: Sequence[SourceFile]) -> dict[str, Any]:
    """What the documents of files are: their content in this order."""
    content = hashlib.sha256("".join(file.sha256 for file in files).encode())
    return {
        "format": kind,
        "files": len(files),
        "size_bytes": sum(file.size_bytes for file in files),
        "content_sha256": content.hexdigest(),
    }


def read_documents(source: Source, advance: Advance = lambda size: None) -> Iterator[str]:
    """The texts of the source in order, at most max_documents of them. A null text is ''.

    Every text can be encoded as UTF-8. Raises SourceUnreadableError, with the file and the line, row or byte.
    """
    for number, (where, text) in enumerate(_located_documents(source, advance)):
        if source.data.max_documents is not None and number >= source.data.max_documents:
            return
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SourceUnreadableError(
                f"{where}: character {error.start} is half of a surrogate pair ({error.object[error.start]!r}), which "
                "no encoding can hold. Repair or remove that document."
            ) from None
        yield text


def read_held_out(source: Source) -> Iterator[str]:
    """The texts of data.validation_paths, all of them, as read_documents."""
    data = source.data.model_copy(update={"max_documents": None})
    return read_documents(replace(source, data=data, files=source.held_out))


def _located_documents(source: Source, advance: Advance) -> Iterator[tuple[str, str]]:
    data = source.data
    if data.source == "hub":
        yield from hub_rows(data, source.revision, advance)
        return
    for file in source.files:
        file.check_unchanged()
        match data.source:
            case "jsonl":
                yield from _json_lines(file, data.text_field, advance)
            case "parquet":
                yield from parquet_rows(file, data.text_field, advance)
            case _:
                # Some modules of the standard library are in another encoding on purpose.
                errors = "replace" if data.source == "python-stdlib" else "strict"
                yield file.name, _whole_text(file, errors)
                advance(file.size_bytes)


def _stdlib_files() -> list[SourceFile]:
    """The standard library without tests and without what differs between builds of one Python version."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        generated = path.name.startswith("_sysconfigdata") or any(folder.startswith("config-") for folder in folders)
        if not generated and _NOT_TRAINING_TEXT.isdisjoint(folders):
            paths.append(path)
    return [
        SourceFile.of(path, str(path)) for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    ]


def _whole_text(file: SourceFile, errors: str) -> str:
    with _opened(file) as (stream, _):
        raw = stream.read()
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise SourceUnreadableError(
            f"{file.name} is not UTF-8 text: byte {error.start} ({raw[error.start]:#04x}) cannot be decoded. "
            "Convert it to UTF-8, or leave it out of data.paths."
        ) from None


def _json_lines(file: SourceFile, text_field: str, advance: Advance) -> Iterator[tuple[str, str]]:
    """One document a line, as `datasets` reads JSON lines, but with the line's number in every error."""
    told = 0
    with _opened(file) as (stream, disk):
        for number, line in enumerate(stream, start=1):
            advance(disk.tell() - told)
            told = disk.tell()
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                where = f"{file.name}, line {number}"
                yield where, _text_of(_parsed(content, where), text_field, where)


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SourceUnreadableError(
            f"{where} is not UTF-8: {error.reason} at byte {error.start}. Repair or remove the line."
        ) from None
    except (ValueError, RecursionError) as error:
        raise SourceUnreadableError(f"{where} is not valid JSON: {error}. Repair or remove the line.") from None


def _text_of(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise SourceUnreadableError(
            f"{where} holds a JSON {type(row).__name__}, not an object with the field {text_field!r}. "
            "Write one object a line."
        )
    if text_field not in row:
        raise SourceUnreadableError(
            f"{where} has no field {text_field!r}. It has: {', '.join(map(repr, row)) or 'no fields'}. "
            "Name the one that holds the text in data.text_field."
        )
    value = row[text_field]
    if value is not None and not isinstance(value, str):
        raise SourceUnreadableError(
            f"{where}: the field {text_field!r} holds a {type(value).__name__}, not text. "
            "Name another field in data.text_field."
        )
    return value or ""


@contextmanager
def _opened(file: SourceFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file's content, decompressed, and the file on disk, whose position tells how much was read."""
    try:
        with file.path.open("rb") as disk:
            if file.name.endswith(".gz"):
                with gzip.GzipFile(fileobj=disk) as stream:
                    yield stream, disk  # type: ignore[misc]  # a GzipFile is read like any binary file
            else:
                yield disk, disk
    except (OSError, EOFError, zlib.error) as error:
        raise SourceUnreadableError(
            f"{file.name} cannot be read: {error}. Repair it or let this user read it."
        ) from error
