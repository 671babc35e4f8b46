"""Datasets of several sources -> batches mixed by weights. Each source keeps its own order and its own epochs."""

import hashlib
import json
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import Rows, Split, TokenDataset, read_dataset_manifest
from relora_train.data.interleaving import PARTS_FILE, interleaving_of
from relora_train.data.packed_dataset import PackedTokens, TooLong
from relora_train.errors import CorpusTooSmallError, DataError


def open_tokens(
    directory: Path, split: Split, *, sequence_length: int, seed: int, too_long: TooLong = "cut"
) -> TokenDataset:
    """Return one split of text or instructions, or of a mixture whose parts.json names the directories of its sources.

    too_long: what becomes of an example longer than a row.
    """
    manifest = read_dataset_manifest(directory)
    if manifest.examples is not None and manifest.examples.kind == "labels":
        raise DataError(
            f"Dataset {manifest.name!r} in {directory} holds labelled texts, from which objective 'causal_lm' does not "
            "learn. Leave [data.labels] out, or set objective to 'sequence_classification'."
        )
    opened: dict[str, Any] = {"sequence_length": sequence_length, "seed": seed, "manifest": manifest}
    if manifest.mixture:
        return MixedTokens(directory, split, **opened, too_long=too_long)
    if manifest.examples is not None:
        return PackedTokens(directory, split, **opened, too_long=too_long)
    return TokenDataset(directory, split, **opened)


class MixedTokens(TokenDataset):
    """One split of a mixture: the examples of all sources, laid end to end in the order of the profile.

    A batch takes of each by its weight. Evaluation reads them end to end, so a score weighs the sources by their
    held-out text.
    """

    def __init__(
        self,
        directory: Path,
        split: Split,
        *,
        sequence_length: int,
        seed: int,
        manifest: DatasetManifest,
        too_long: TooLong = "cut",
    ) -> None:
        places = json.loads((directory / PARTS_FILE).read_bytes())
        self._parts = [
            open_tokens(
                Path(places[part.name]),
                split,
                sequence_length=sequence_length,
                seed=source_seed(seed, part.name),
                too_long=too_long,
            )
            for part in manifest.mixture
        ]
        shards = [shard for part in self._parts for shard in part.shards]
        super().__init__(directory, split, sequence_length=sequence_length, seed=seed, manifest=manifest, shards=shards)
        self._first_of = list(accumulate((part.blocks for part in self._parts), initial=0))
        self.blocks = self._first_of[-1]
        self.left_out = dict(sum((Counter(part.left_out) for part in self._parts), Counter()))
        self.interleaving = interleaving_of(manifest)

    def block_at(self, place: int) -> int:
        source, index = self.interleaving.place(place)
        return self._first_of[source] + self._parts[source].block_at(index)

    def require_batch(self, count: int) -> None:
        for part, most, mixed in zip(self._parts, self.interleaving.most(count), self.manifest.mixture, strict=True):
            if part.blocks < most:
                times = f", {most / part.blocks:.3g} epochs of it," if part.blocks else ""
                raise CorpusTooSmallError(
                    f"Source {mixed.name!r} of dataset {self.manifest.name!r} has {part.tokens:,} tokens to train on, "
                    f"which makes {part.blocks:,} sequences of {self.sequence_length} tokens; by its weight, "
                    f"{mixed.weight} of the sum, a batch of {count:,} takes up to {most:,}{times} and one at most is "
                    "allowed. Give it more text or a smaller weight, or lower batch.sequences or batch.sequence_length."
                )

    def _gather(self, blocks: list[int]) -> Rows:
        out: Rows = np.empty((len(blocks), self._width), dtype=self.dtype)
        sources = np.searchsorted(self._first_of, blocks, side="right") - 1
        for number, part in enumerate(self._parts):
            of_part = np.flatnonzero(sources == number)
            out[of_part] = part._gather([blocks[place] - self._first_of[number] for place in of_part.tolist()])
        return out


def source_seed(seed: int, name: str) -> int:
    """Return the seed of one source's order: two sources of as many examples are shuffled each in its own way."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big")
