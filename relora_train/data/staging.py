"""Documents -> staged ranges: the text of each split on disk, cut where shards will be cut.

A range is the source of exactly one shard, so a shard can be made by any process at any time. A range is closed before
its text and one separator a piece (and BOS, where documents begin with it) would exceed `shard_tokens` bytes; a
byte-level token is a byte or more, so the shard never exceeds `shard_tokens` tokens, and is usually a quarter of that.

A document longer than `PIECE_BYTES` becomes several pieces, which bounds the memory of encoding one. Its pieces follow
one another and only the last is followed by the separator. splitting.py says which side a document goes to.
"""

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from relora_train.data.splitting import (
    DOCUMENT_BYTES,
    PIECE_BYTES,
    Side,
    Split,
    cut_into_pieces,
    side_for,
    split_digest,
    split_of,
)
from relora_train.errors import DataError
from relora_train.settings.base import FrozenConfig
from relora_train.storage.durable import write_durably

_INDEX_NAME = "index.json"
_SAMPLE_NAME = "sample.json"
_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 64, 4096
_COUNTED_DIGESTS = 1 << 18


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

    def documents(self, split: Split) -> int:
        return sum(staged.documents for staged in self.ranges if staged.split == split)

    def text_bytes(self, split: Split) -> int:
        return sum(staged.text_bytes for staged in self.ranges if staged.split == split)


def stage_documents(
    documents: Iterable[str],
    directory: Path,
    side: Side,
    *,
    range_bytes: int,
    markers: int = 1,
    split_note: str = "",
    held_out: Iterable[str] = (),
    left_out: Callable[[], list[dict[str, Any]]] = list,
) -> StagedCorpus:
    """Write all documents to `directory` as ranges, then its index; empty ones are left out.

    markers: tokens around a document that are not its text. split_note: why `side` is not split_of. held_out: documents
    that go to validation whatever `side` says. left_out: asked when all were read.
    A directory whose index is there is complete and used as it is. Staging that was interrupted begins anew.
    """
    if (directory / _INDEX_NAME).is_file():
        return StagedCorpus.model_validate_json((directory / _INDEX_NAME).read_bytes())
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    train = _RangeWriter(directory, "train", range_bytes, markers)
    val = _RangeWriter(directory, "val", range_bytes, markers)
    duplicates, empty = _DuplicateCounter(), 0
    sample: list[str] = []
    with closing(train), closing(val):
        for text, is_held_out in chain(((text, False) for text in documents), ((text, True) for text in held_out)):
            if not text:
                empty += 1
                continue
            digest = split_digest(text)
            duplicates.add(digest)
            writer = val if is_held_out or side(digest) == "val" else train
            writer.add(text)
            if len(sample) < _SAMPLE_DOCUMENTS:
                sample.append(text[:_SAMPLE_CHARACTERS])
    corpus = StagedCorpus(
        ranges=(*train.ranges, *val.ranges),
        empty_documents=empty,
        duplicate_documents=duplicates.estimate,
        split_note=split_note,
        left_out=left_out(),
    )
    write_durably(directory / _SAMPLE_NAME, json.dumps(sample).encode())
    write_durably(directory / _INDEX_NAME, corpus.model_dump_json().encode())
    return corpus


def stage_both_sides(
    documents: Iterable[str],
    read_again: Callable[[], Iterable[str]],
    directory: Path,
    *,
    validation_fraction: float,
    range_bytes: int,
    markers: int,
    held_out: Iterable[str] | None = None,
    left_out: Callable[[], list[dict[str, Any]]] = list,
) -> StagedCorpus:
    """Stage by the split rule; if it leaves a side empty, again with one document moved there, cut first where few.

    Few are fewer than the rule needs to expect one on each side. A source that the rule splits is staged as ever.
    held_out: the validation part, instead of the rule.
    """
    stage = partial(stage_documents, range_bytes=range_bytes, markers=markers, left_out=left_out)
    if held_out is not None:
        return stage(documents, directory, lambda digest: "train", held_out=held_out)
    corpus = stage(documents, directory, partial(split_of, validation_fraction=validation_fraction))
    sizes = corpus.documents("train"), corpus.documents("val")
    if sum(sizes) == 0 or 0 not in sizes:
        return corpus
    few = sum(sizes) * min(validation_fraction, 1 - validation_fraction) < 1
    done = f"documents were cut to {DOCUMENT_BYTES:,} bytes" if few else "the document nearest to that side was moved"
    note = f"The split rule leaves a side of {sum(sizes)} documents empty, so {done}"

    def read() -> Iterable[str]:
        for text in read_again():
            yield from (piece.decode() for piece in cut_into_pieces(text, DOCUMENT_BYTES)) if few else [text]

    side = side_for((split_digest(text) for text in read() if text), validation_fraction)
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

    def add(self, text: str) -> None:
        pieces = cut_into_pieces(text, min(PIECE_BYTES, self._range_bytes - self._markers))
        for piece, following in pairwise(chain(pieces, [b""])):
            self._append(piece, ends_document=not following)

    def close(self) -> None:
        if self._codes:
            self._close()
        else:
            self._stream.close()

    def _append(self, piece: bytes, *, ends_document: bool) -> None:
        # Separator and BOS are counted for every piece, though only a document's last and first get them.
        full = self._text_bytes + len(piece) + self._markers * (len(self._codes) + 1) > self._range_bytes
        if self._codes and full:
            self._close()
            self._begin()
        self._stream.write(piece)
        self._digest.update(piece)
        self._codes.append(len(piece) << 1 | ends_document)
        self._text_bytes += len(piece)
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


class _DuplicateCounter:
    """Counts digests seen before, in bounded memory: when there are too many, every second one is left out."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._mask = 0

    def add(self, digest: int) -> None:
        if digest & self._mask:
            return
        self._seen[digest] = self._seen.get(digest, -1) + 1
        while len(self._seen) > _COUNTED_DIGESTS:
            self._mask = self._mask << 1 | 1
            self._seen = {d: count for d, count in self._seen.items() if not d & self._mask}

    @property
    def estimate(self) -> int:
        return sum(self._seen.values()) * (self._mask + 1)
