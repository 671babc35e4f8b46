"""The tokenizer and the documents that make a dataset: of a growing source, the new ones and a share of the old.

The training part has every new document, and so many old ones that they make up `old_ratio` of the part's bytes.
The held-out part has every new document that the split rule holds out, and as much of the old held-out ones. So half of
a score is about what is to be learned, and half about what must not be forgotten.
The old documents taken are those whose hash, drawn anew for every selection, lies lowest. No list of them is needed,
and over many selections all get their turn. The split rule (splitting.py) knows nothing of new and old: a document that
is held out once is held out always.
Files are told apart by content. The old documents of a hub dataset are those of the old revision.
Sizes are those of the files; of a hub dataset, numbers of documents.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field

from relora_train.data.chat import CHAT_RULE, ChatTemplate, find_template
from relora_train.data.packed_dataset import PACKING_RULE
from relora_train.data.records import Document
from relora_train.data.source_files import SourceFile
from relora_train.data.sources import Advance, Source, identify, read_documents, resolve_source
from relora_train.data.splitting import PIECE_BYTES, SPLIT_RULE, split_digest, split_of
from relora_train.data.tokenizer import DEFAULT_EOS_TOKEN, DocumentTokenizer, load_tokenizer
from relora_train.errors import SourceUnreadableError, TokenizerError
from relora_train.settings.base import FrozenConfig
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.keys import settings_digest

DATASET_FORMAT = 1
"""Raised whenever the same inputs would give other bytes."""

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

    def read(self, validation_fraction: float, advance: Advance = lambda size: None) -> Iterator[Document]:
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


@dataclass(frozen=True)
class DatasetInputs:
    """Source and tokenizer, found and hashed, with nothing done yet."""

    data: DataConfig
    settings: TokenizerConfig
    source: SelectedSource
    loaded: DocumentTokenizer | None
    """None when one is to be trained."""

    template: ChatTemplate | None = None
    """Only for messages."""

    @property
    def dataset_id(self) -> str:
        return settings_digest(self.hashed())

    @property
    def eos_token(self) -> str:
        return self.loaded.eos_token if self.loaded else self.settings.eos_token or DEFAULT_EOS_TOKEN

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The ids that stand before each document."""
        return self.loaded.bos_ids if self.loaded else ()

    def hashed(self) -> dict[str, Any]:
        """Return all that can change a byte of the dataset, and nothing else: no path, no number of workers."""
        data, settings = self.data, self.settings
        trained = {"trained": "byte-level BPE", **settings.model_dump(include={"vocab_size", "training_bytes"})}
        if settings.mask_token:
            trained["mask_token"] = settings.mask_token
        later: dict[str, Any] = {"bos_ids": list(self.bos_ids)} if self.bos_ids else {}
        if data.unreadable == "skip":
            later["unreadable"] = "skip"
        if self.template is not None:
            digest = hashlib.sha256(self.template.text.encode()).hexdigest()
            special = dict(self.template.special_tokens)
            later["chat"] = {"template_sha256": digest, "special_tokens": special, "rule": CHAT_RULE}
        for section in ("instructions", "labels"):
            if (settings_of := getattr(data, section)) is not None:
                later[section] = settings_of.model_dump(exclude={"chat_template"})
        if data.instructions is not None:
            later["packing"] = PACKING_RULE  # a run that goes on packs as it began
        split: dict[str, Any] = {"rule": SPLIT_RULE, "validation_fraction": data.validation_fraction}
        if held_out := self.source.new.held_out:
            split = {"rule": "data.validation_paths", **identify(data.source, held_out)}
        return later | {
            "dataset_format": DATASET_FORMAT,
            "source": self.source.identity,
            "text_field": data.text_field if data.source in ("jsonl", "csv", "parquet", "hub") else None,
            "max_documents": data.max_documents,
            "tokenizer": {"sha256": self.loaded.sha256} if self.loaded else trained,
            "eos_token": self.eos_token,
            "split": split,
            "shard_tokens": data.shard_tokens,
            "piece_bytes": PIECE_BYTES,
        }


def resolve_inputs(data: DataConfig, settings: TokenizerConfig, selection: Selection | None) -> DatasetInputs:
    """Look everything up. Raises SourceUnreadableError, TokenizerError and the errors of the source's store.

    selection: take only this of the source; all of it when absent.
    """
    source = resolve_source(data)
    return inputs_of(source, settings, selection or Selection(new=contents_of(source)))


def inputs_of(source: Source, settings: TokenizerConfig, selection: Selection) -> DatasetInputs:
    """Do what resolve_inputs does for a source that was found already."""
    bos, loaded = source.data.bos, None
    if settings.path:
        loaded = load_tokenizer(settings.path, eos_token=settings.eos_token, revision=settings.revision, bos=bos)
    elif bos is True:
        raise TokenizerError(
            "data.bos = true asks for a BOS token before each document, and a tokenizer that is trained has none: its "
            "one separator stands between documents. Set data.bos to 'auto', or name a tokenizer in tokenizer.path."
        )
    template = template_of(source.data, loaded, settings)
    source = replace(source, records=replace(source.records, template=template))
    return DatasetInputs(source.data, settings, select_source(source, selection), loaded, template)


def template_of(data: DataConfig, loaded: DocumentTokenizer | None, settings: TokenizerConfig) -> ChatTemplate | None:
    """Return the template for a source of messages; None for any other. Raises TokenizerError."""
    if data.instructions is None or data.instructions.messages is None:
        return None
    return find_template(data.instructions.chat_template, loaded, settings.eos_token or DEFAULT_EOS_TOKEN)
