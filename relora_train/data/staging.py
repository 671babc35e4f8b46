"""Documents -> staged ranges: the text of each split on disk, cut where shards will be cut.

A range is the source of exactly one shard, so a shard can be made by any process at any time. A range is closed before
its text and one separator a piece (and BOS, where documents begin with it) would exceed `shard_tokens` bytes; a
byte-level token is a byte or more, so the shard never exceeds `shard_tokens` tokens, and is usually a quarter of that.

A document longer than `PIECE_BYTES` becomes several pieces, which bounds the memory of encoding one. Its pieces follow
one another and only the last is followed by the separator. splitting.py says which side a document goes to.
An example's pieces are its parts (records.py), and lie in one range: one that is larger is a range of its own.
"""

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from relora_train.data.records import Document, document_digest, text_in
from relora_train.data.splitting import (
    DOCUMENT_BYTES,
    PIECE_BYTES,
    DuplicateCounter,
    Side,
    Split,
    cut_into_pieces,
    side_for,
    split_of,
)
from relora_train.errors import DataError
from relora_train.settings.base import FrozenConfig
from relora_train.settings.data import Holds
from relora_train.storage.durable import write_durably

_INDEX_NAME = "index.json"
_SAMPLE_NAME = "sample.json"
_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 64, 4096


class StagedRange(FrozenConfig):
    """One range on disk: `<name>.text`, and in `<name>.pieces` 2 * bytes + (1 if its document ends) for each piece."""

    split: Split
    index: int
    documents: int
    """Documents that end in this range."""

    text_bytes: int
    sha256: str
    """The digest of the text."""

    begins_document: bool = True
    """False where a document that the range before has begun goes on."""

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:05d}"


class StagedClass(FrozenConfig):
    """The labelled texts of one class."""

    first: str
    """The place of the first of them."""

    train: int = 0
    val: int = 0


class StagedCorpus(FrozenConfig):
    """The ranges that staging made, in the order of the source within each split."""

    ranges: tuple[StagedRange, ...]
    empty_documents: int
    duplicate_documents: int
    """Documents whose normalised text was seen before, among the first quarter of a million different ones."""

    split_note: str = ""
    """The remedy for a side that the split rule left empty."""

    left_out: list[dict[str, Any]] = Field(default_factory=list)
    """The faults that data.unreadable = "skip" left out; see left_out.py."""

    classes: dict[str, StagedClass] = Field(default_factory=dict)
    """Those of labelled texts, by name."""

    def documents(self, split: Split) -> int:
        return sum(staged.documents for staged in self.ranges if staged.split == split)

    def text_bytes(self, split: Split) -> int:
        return sum(staged.text_bytes for staged in self.ranges if staged.split == split)


def stage_documents(
    documents: Iterable[Document],
    directory: Path,
    side: Side,
    *,
    range_bytes: int,
    markers: int = 1,
    split_note: str = "",
    held_out: Iterable[Document] = (),
    left_out: Callable[[], list[dict[str, Any]]] = list,
    holds: Holds = "texts",
    first_of_class: Mapping[str, str] | None = None,
) -> StagedCorpus:
    """Write all documents to `directory` as ranges, then its index; empty ones are left out.

    markers: tokens around a document that are not its text. split_note: why `side` is not split_of. held_out: documents
    that go to validation whatever `side` says. left_out: asked when all were read. holds: the kind of documents.
    first_of_class: filled while they are read.
    A directory whose index is there is complete and used as it is. Staging that was interrupted begins anew.
    """
    if (directory / _INDEX_NAME).is_file():
        return read_index(directory)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    train = _RangeWriter(directory, "train", range_bytes, markers)
    val = _RangeWriter(directory, "val", range_bytes, markers)
    counts: dict[Split, Counter[str]] = {"train": Counter(), "val": Counter()}
    duplicates, empty = DuplicateCounter(), 0
    sample: list[str] = []
    with closing(train), closing(val):
        for document, is_held_out in chain(((one, False) for one in documents), ((one, True) for one in held_out)):
            if not document:
                empty += 1
                continue
            digest = document_digest(document, holds)
            duplicates.add(digest)
            split: Split = "val" if is_held_out else side(digest)
            (val if split == "val" else train).add(document)
            if holds == "labels":
                counts[split][document[-1]] += 1
            if len(sample) < _SAMPLE_DOCUMENTS:
                sample.append(text_in(document)[:_SAMPLE_CHARACTERS])
    corpus = StagedCorpus(
        ranges=(*train.ranges, *val.ranges),
        empty_documents=empty,
        duplicate_documents=duplicates.estimate,
        split_note=split_note,
        left_out=left_out(),
        classes={
            name: StagedClass(first=first, **{split: counts[split][name] for split in counts})
            for name, first in sorted((first_of_class or {}).items())
        },
    )
    write_durably(directory / _SAMPLE_NAME, json.dumps(sample).encode())
    write_durably(directory / _INDEX_NAME, corpus.model_dump_json().encode())
    return corpus


def stage_both_sides(
    documents: Iterable[Document],
    read_again: Callable[[], Iterable[Document]],
    directory: Path,
    *,
    validation_fraction: float,
    range_bytes: int,
    markers: int,
    held_out: Iterable[Document] | None = None,
    left_out: Callable[[], list[dict[str, Any]]] = list,
    holds: Holds = "texts",
    first_of_class: Mapping[str, str] | None = None,
) -> StagedCorpus:
    """Stage by the split rule; if it leaves a side empty, again with one document moved there, cut first where few.

    Few are fewer than the rule needs to expect one on each side. A source that the rule splits is staged as ever.
    held_out: the validation part, instead of the rule.
    """
    stage = partial(
        stage_documents,
        range_bytes=range_bytes,
        markers=markers,
        left_out=left_out,
        holds=holds,
        first_of_class=first_of_class,
    )
    if held_out is not None:
        return stage(documents, directory, lambda digest: "train", held_out=held_out)
    corpus = stage(documents, directory, partial(split_of, validation_fraction=validation_fraction))
    sizes = corpus.documents("train"), corpus.documents("val")
    if sum(sizes) == 0 or 0 not in sizes:
        return corpus
    few = holds == "texts" and sum(sizes) * min(validation_fraction, 1 - validation_fraction) < 1
    done = f"documents were cut to {DOCUMENT_BYTES:,} bytes" if few else "the document nearest to that side was moved"
    note = f"The split rule leaves a side of {sum(sizes)} documents empty, so {done}"

    def read() -> Iterable[Document]:
        for one in read_again():
            if few and isinstance(one, str):
                yield from (piece.decode() for piece in cut_into_pieces(one, DOCUMENT_BYTES))
            else:
                yield one

    side = side_for((document_digest(one, holds) for one in read() if one), validation_fraction)
    shutil.rmtree(directory)
    return stage(read(), directory, side, split_note=note)


def read_pieces(directory: Path, staged: StagedRange) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a range with whether their document ends there, read in bounded memory.

    Raises DataError after the last piece when the text is not what was staged.
    """
    codes = np.fromfile(directory / f"{staged.name}.pieces", dtype="<u4")
    digest = hashlib.sha256()
    with (directory / f"{staged.name}.text").open("rb") as stream:
        for code in codes.tolist():
            raw = stream.read(code >> 1)
            digest.update(raw)
            yield raw.decode(errors="replace"), bool(code & 1)
    if digest.hexdigest() != staged.sha256:
        raise DataError(f"{directory / staged.name}.text was damaged on this disk. Delete {directory} and run again.")


def read_index(directory: Path) -> StagedCorpus:
    """Return what was staged in a directory."""
    return StagedCorpus.model_validate_json((directory / _INDEX_NAME).read_bytes())


def read_sample(directory: Path) -> list[str]:
    """Return the beginnings of some documents, to compare engines on."""
    return [str(text) for text in json.loads((directory / _SAMPLE_NAME).read_bytes())]


class _RangeWriter:
    """Appends documents of one split, closing a range whenever the next piece would overfill it."""

    def __init__(self, directory: Path, split: Split, range_bytes: int, markers: int) -> None:
        self.ranges: list[StagedRange] = []
        self._directory, self._split, self._range_bytes, self._markers = directory, split, range_bytes, markers
        self._inside_document = False
        self._begin()

    def add(self, document: Document) -> None:
        if not isinstance(document, str):
            self._append([part.encode() for part in document], ends_document=True)
            return
        pieces = cut_into_pieces(document, min(PIECE_BYTES, self._range_bytes - self._markers))
        for piece, following in pairwise(chain(pieces, [b""])):
            self._append([piece], ends_document=not following)

    def close(self) -> None:
        if self._codes:
            self._close()
        else:
            self._stream.close()

    def _close_if_full(self, size_bytes: int) -> None:
        # Separator and BOS are counted for every piece, though only a document's last and first get them.
        full = self._text_bytes + size_bytes + self._markers * (len(self._codes) + 1) > self._range_bytes
        if self._codes and full:
            self._close()
            self._begin()

    def _append(self, pieces: list[bytes], *, ends_document: bool) -> None:
        raw = b"".join(pieces)
        self._close_if_full(len(raw))
        self._stream.write(raw)
        self._digest.update(raw)
        self._codes.extend(len(piece) << 1 for piece in pieces)
        self._codes[-1] |= ends_document
        self._text_bytes += len(raw)
        self._documents += ends_document
        self._inside_document = not ends_document

    def _begin(self) -> None:
        self._digest, self._text_bytes, self._documents = hashlib.sha256(), 0, 0
        self._codes = array("I")
        self._begins_document = not self._inside_document
        self._stream = self._path("text").open("wb")

    def _close(self) -> None:
        self._stream.close()
        self._path("pieces").write_bytes(np.asarray(self._codes, dtype="<u4").tobytes())
        self.ranges.append(
            StagedRange(
                split=self._split,
                index=len(self.ranges),
                documents=self._documents,
                text_bytes=self._text_bytes,
                sha256=self._digest.hexdigest(),
                begins_document=self._begins_document,
            )
        )

    def _path(self, ending: str) -> Path:
        return self._directory / f"{self._split}-{len(self.ranges):05d}.{ending}"
