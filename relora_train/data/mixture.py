"""Several weighted sources: how they make one dataset's name, and the tokenizer that is trained for all of them.

Each source becomes a dataset of its own, named by its content and the tokenizer, so mixtures that differ in weights
share them. A mixture is named by what all of them are made of, and the weights.

`python -m relora_train.data.mixture --request FILE` (a MixedTokenizerRequest as JSON) trains the tokenizer.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from relora_train.checkpoints.manifest import DatasetManifest, FileEntry, MixedDataset
from relora_train.data.interleaving import INTERLEAVING_RULE
from relora_train.data.prepare import begin_beside_parent
from relora_train.data.records import Document, text_in
from relora_train.data.selection import DATASET_FORMAT, DatasetInputs, Selection, contents_of, inputs_of, template_of
from relora_train.data.sources import Source, read_documents, resolve_source
from relora_train.data.splitting import cut_into_pieces, split_digest, split_of
from relora_train.data.tokenizer import DocumentTokenizer, train_tokenizer
from relora_train.errors import CorpusEmptyError, TokenizerError
from relora_train.process import Emit, serve_request
from relora_train.settings.base import FrozenConfig
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.keys import settings_digest

_PIECE_BYTES = 4096  # a sample is cut to a share within so much


@dataclass(frozen=True)
class MixtureInputs:
    """The inputs of all sources of a mixture, found and hashed, with nothing done yet."""

    data: DataConfig
    parts: tuple[DatasetInputs, ...]

    @property
    def dataset_id(self) -> str:
        return settings_digest(self.hashed())

    @property
    def loaded(self) -> DocumentTokenizer | None:
        """The tokenizer of all sources; None when one is to be trained."""
        return self.parts[0].loaded

    def hashed(self) -> dict[str, Any]:
        """Return all that can change a byte of the sources' datasets, or which of them a batch takes."""
        weights = self.data.shares
        sources = {f"source {name}": {"weight": str(weights[name])} for name in weights}
        for part in self.parts:
            sources[f"source {part.data.name}"] |= part.hashed()
        bos_ids = self.parts[0].bos_ids
        rules = {"dataset_format": DATASET_FORMAT, "mixture": INTERLEAVING_RULE, "order": list(weights)}
        return rules | sources | ({"bos_ids": list(bos_ids)} if bos_ids else {})


def resolve_sources(data: DataConfig) -> tuple[Source, ...]:
    """Find and hash the source of the settings, or each of several. Raises as resolve_source."""
    return tuple(map(resolve_source, data.parts()))


def inputs_of_sources(
    data: DataConfig, settings: TokenizerConfig, sources: Sequence[Source]
) -> DatasetInputs | MixtureInputs:
    """Return what a dataset is made of, of sources that were found already. Raises TokenizerError."""
    parts = tuple(
        inputs_of(replace(source, data=part), settings, Selection(new=contents_of(source)))
        for part, source in zip(data.parts(), sources, strict=True)
    )
    templates = {part.template.text: part.data.name for part in parts if part.template}
    if len(templates) > 1:
        raise TokenizerError(
            f"Sources {' and '.join(map(repr, templates.values()))} have different chat templates, and a model is used "
            "with one. Name the same file in data.instructions.chat_template of each."
        )
    return MixtureInputs(data, parts) if data.sources else parts[0]


def mixture_manifest(
    data: DataConfig,
    dataset_id: str,
    hashed: dict[str, Any],
    parts: Sequence[DatasetManifest],
    files: tuple[FileEntry, ...],
) -> DatasetManifest:
    """Return the manifest of a mixture of committed datasets, in the order of data.sources."""
    same = parts[0]
    counts = [f"{split}_{unit}" for split in ("train", "val") for unit in ("tokens", "documents", "bytes")]
    return DatasetManifest(
        files=files,
        attempt=secrets.token_hex(8),
        versions=same.versions,
        name=data.name,
        dataset_id=dataset_id,
        inputs=hashed,
        token_dtype=same.token_dtype,
        vocab_size=same.vocab_size,
        eos_id=same.eos_id,
        **{count: sum(getattr(part, count) for part in parts) for count in counts},
        examples=next((part.examples for part in parts if part.examples), None),
        mixture=tuple(
            MixedDataset(name=part.name, weight=str(share), dataset_id=part.dataset_id, train_tokens=part.train_tokens)
            for part, share in zip(parts, data.shares.values(), strict=True)
        ),
    )


class MixedTokenizerRequest(FrozenConfig):
    """Train the tokenizer of a mixture in a process of its own."""

    data: DataConfig
    tokenizer: TokenizerConfig
    directory: Path
    """The place for its files."""


def train_on_mixture(data: DataConfig, settings: TokenizerConfig) -> DocumentTokenizer:
    """Return a tokenizer trained on the beginnings of all sources' training parts, by their weights.

    The sample holds tokenizer.training_bytes, or as much as the sources hold up to their shares of that. A source with
    less than its share is read again, as in training. Its documents that the split rule holds out are left out, except
    where it holds out all. Raises CorpusEmptyError for a source without text.
    """
    sources, weights = tuple(_ready(source, settings) for source in resolve_sources(data)), data.shares
    limits = {name: max(1, int(share * settings.training_bytes)) for name, share in weights.items()}
    there = {name: sum(map(len, _pieces(source, limits[name]))) for name, source in zip(weights, sources, strict=True)}
    if empty := [name for name, size in there.items() if size == 0]:
        raise CorpusEmptyError(
            f"Source {empty[0]!r} of dataset {data.name!r} holds no text. Correct its paths, text_field or "
            "max_documents in [[data.sources]]."
        )
    size = sum(there.values())
    texts = chain.from_iterable(
        _cut(chain.from_iterable(_pieces(source, limits[name]) for _ in repeat(None)), int(size * weights[name]))
        for name, source in zip(weights, sources, strict=True)
    )
    return train_tokenizer(
        (text.decode() for text in texts),
        vocab_size=settings.vocab_size,
        eos_token=settings.eos_token,
        mask_token=settings.mask_token,
    )


def _ready(source: Source, settings: TokenizerConfig) -> Source:
    return replace(source, records=replace(source.records, template=template_of(source.data, None, settings)))


def _pieces(source: Source, limit_bytes: int) -> Iterator[bytes]:
    """Yield the beginning of a source's training part, in pieces."""
    fraction = source.data.validation_fraction

    def is_taken(document: Document) -> bool:
        return bool(document) and (bool(source.held_out) or split_of(split_digest(document), fraction) == "train")

    taken = (document for document in read_documents(source) if is_taken(document))
    first = next(taken, None)
    documents = read_documents(source) if first is None else chain([first], taken)
    pieces = chain.from_iterable(cut_into_pieces(text_in(document), _PIECE_BYTES) for document in documents)
    return _cut(pieces, limit_bytes)


def _cut(pieces: Iterator[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Yield pieces until there are `limit_bytes`; the one that reaches the limit is given whole."""
    given = 0
    for piece in pieces:
        if given >= limit_bytes:
            return
        yield piece
        given += len(piece)


def _serve(request: MixedTokenizerRequest, emit: Emit) -> None:
    begin_beside_parent()
    request.directory.mkdir(exist_ok=True)
    train_on_mixture(request.data, request.tokenizer).save(request.directory)


if __name__ == "__main__":
    serve_request(MixedTokenizerRequest, _serve)
