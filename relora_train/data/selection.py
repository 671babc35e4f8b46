"""The documents of a growing source that make the next dataset: what is new, and a share of what is old.

The training part has every new document, and so many old ones that they make up `old_ratio` of the part's bytes.
The held-out part has every new document that the split rule holds out, and as much of the old held-out ones. So half of
a score is about what is to be learned, and half about what must not be forgotten.
The old documents taken are those whose hash, drawn anew for every selection, lies lowest. No list of them is needed,
and over many selections all get their turn. The split rule (splitting.py) knows nothing of new and old: a document that
is held out once is held out always.
Files are told apart by content. The old documents of a hub dataset are those of the old revision.
Sizes are those of the files; of a hub dataset, numbers of documents.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field

from relora_train.data.source_files import SourceFile
from relora_train.data.sources import Advance, Source, identify, read_documents
from relora_train.data.splitting import split_digest, split_of
from relora_train.errors import SourceUnreadableError
from relora_train.settings.base import FrozenConfig

SELECTION_RULE = "blake2b-64 of seed, new content and split digest; old held-out up to new; 1"


class Selection(FrozenConfig):
    """The parts of a source to take, named by content."""

    new: tuple[str, ...] = ()
    """SHA-256 of the files that are new; for the hub, one revision."""

    old: tuple[str, ...] = ()
    """The digests of the old files; for the hub, the revision that was read last. Empty: everything is new."""

    old_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of old documents in the training part."""

    seed: int = 0
    """Draws other old documents."""


@dataclass(frozen=True)
class SelectedSource:
    """A source with what is taken of it, ready to be read."""

    new: Source
    old: Source | None
    selection: Selection

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of both; when everything is new, that of the new files alone."""
        if self.old is None:
            return self.new.identity
        return {
            "new": self.new.identity,
            "old": self.old.identity,
            "old_ratio": self.selection.old_ratio,
            "seed": self.selection.seed,
            "rule": SELECTION_RULE,
        }

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """On this machine's disk, new ones first."""
        return self.new.files + (self.old.files if self.old else ())

    @property
    def size_bytes(self) -> int | None:
        """Bytes that reading will go through; None where that is unknown beforehand."""
        sizes = [source.size_bytes for source in (self.new, self.old) if source is not None]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def read(self, validation_fraction: float, advance: Advance = lambda size: None) -> Iterator[str]:
        """Yield the texts: new ones in the order of the source, then the chosen old ones. Raises as read_documents."""
        if self.old is None:
            yield from read_documents(self.new, advance)
        elif self.new.files:
            yield from read_documents(self.new, advance)
            old = replace(self.old, data=self.old.data.model_copy(update={"max_documents": None}))
            new_bytes, old_bytes = (sum(file.size_bytes for file in one.files) for one in (self.new, old))
            chosen = self._chooser(validation_fraction, new_size=new_bytes, old_size=old_bytes)
            yield from (text for text in read_documents(old, advance) if chosen(split_digest(text)))
        else:
            digests = array("Q", (split_digest(text) for text in read_documents(self.old, advance)))
            known = np.unique(np.frombuffer(digests, dtype=np.uint64)) if digests else np.empty(0, np.uint64)
            count = 0
            for text in read_documents(self.new, advance):
                digest = split_digest(text)
                place = int(np.searchsorted(known, np.uint64(digest)))
                if place == len(known) or int(known[place]) != digest:
                    count += 1
                    yield text
            chosen = self._chooser(validation_fraction, new_size=count, old_size=len(digests))
            yield from (text for text in read_documents(self.old, advance) if chosen(split_digest(text)))

    def _chooser(self, validation_fraction: float, *, new_size: int, old_size: int) -> Callable[[int], bool]:
        """Return True if the old document with this split digest is taken. Pure."""
        ratio = self.selection.old_ratio
        as_much = new_size / max(old_size, 1)
        share = {"train": as_much * ratio / (1 - ratio), "val": as_much}
        salt = json.dumps([self.selection.seed, self.new.identity], sort_keys=True).encode()

        def chosen(digest: int) -> bool:
            drawn = hashlib.blake2b(salt + digest.to_bytes(8, "big"), digest_size=8).digest()
            return int.from_bytes(drawn, "big") < share[split_of(digest, validation_fraction)] * 2.0**64

        return chosen


def select_source(source: Source, selection: Selection) -> SelectedSource:
    """Return the parts of a source that the selection names. Raises SourceUnreadableError when a part is gone."""
    if source.data.source == "hub":
        new, *old = (
            replace(
                source,
                data=source.data.model_copy(update={"hub_revision": revision}),
                identity={**source.identity, "revision": revision},
                revision=revision,
            )
            for revision in (*selection.new, *selection.old)
        )
        return SelectedSource(new, old[0] if old else None, selection)
    found = _with_files(source, selection.new)
    if missing := set(selection.new) - {file.sha256 for file in found.files}:
        raise SourceUnreadableError(
            f"{len(missing)} of {len(selection.new)} new files of source {source.data.source!r} are not there any more "
            "or have changed. Put them back, or run again to make another dataset of what is there."
        )
    old_files = _with_files(source, selection.old)
    return SelectedSource(found, old_files if old_files.files else None, selection)


def contents_of(source: Source) -> tuple[str, ...]:
    """Return what a selection calls a source's parts, sorted: digests of its files, or the one revision."""
    return (source.revision,) if source.data.source == "hub" else tuple(sorted({file.sha256 for file in source.files}))


def _with_files(source: Source, digests: tuple[str, ...]) -> Source:
    wanted = set(digests)
    files = tuple(file for file in source.files if file.sha256 in wanted)
    return replace(source, files=files, identity=identify(source.data.source, files))
