"""The inputs of a dataset, and the id that follows from them before any text is tokenized. Light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relora_train.data.selection import SelectedSource, Selection, contents_of, select_source
from relora_train.data.sources import Source, identify, resolve_source
from relora_train.data.splitting import PIECE_BYTES, SPLIT_RULE
from relora_train.data.tokenizer import DEFAULT_EOS_TOKEN, DocumentTokenizer, load_tokenizer
from relora_train.errors import TokenizerError
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.keys import settings_digest

DATASET_FORMAT = 1
"""Raised whenever the same inputs would give other bytes."""


@dataclass(frozen=True)
class DatasetInputs:
    """Source and tokenizer, found and hashed, with nothing done yet."""

    data: DataConfig
    settings: TokenizerConfig
    source: SelectedSource
    loaded: DocumentTokenizer | None
    """None when one is to be trained."""

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
        later: dict[str, Any] = {"bos_ids": list(self.bos_ids)} if self.bos_ids else {}
        if data.unreadable == "skip":
            later["unreadable"] = "skip"
        split: dict[str, Any] = {"rule": SPLIT_RULE, "validation_fraction": data.validation_fraction}
        if held_out := self.source.new.held_out:
            split = {"rule": "data.validation_paths", **identify(data.source, held_out)}
        return later | {
            "dataset_format": DATASET_FORMAT,
            "source": self.source.identity,
            "text_field": data.text_field if data.source in ("jsonl", "parquet", "hub") else None,
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
    return DatasetInputs(source.data, settings, select_source(source, selection), loaded)
