"""Datasets of several sources -> batches mixed by weights. Each source keeps its own order and its own epochs."""

import hashlib
import json
from itertools import accumulate
from pathlib import Path

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import Split, TokenDataset, read_dataset_manifest
from relora_train.data.interleaving import PARTS_FILE, interleaving_of
from relora_train.errors import CorpusTooSmallError


def open_tokens(directory: Path, split: Split, *, sequence_length: int, seed: int) -> TokenDataset:
    """Return one split of a dataset of text, or of a mixture whose parts.json names the directories of its sources."""
    manifest = read_dataset_manifest(directory)
    kind = MixedTokens if manifest.mixture else TokenDataset
    return kind(directory, split, sequence_length=sequence_length, seed=seed, manifest=manifest)


class MixedTokens(TokenDataset):
    """One split of a mixture: the examples of all sources, laid end to end in the order of the profile.

    A batch takes of each by its weight. Evaluation reads them end to end, so a score weighs the sources by their
    held-out text.
    """

    def __init__(
        self, directory: Path, split: Split, *, sequence_length: int, seed: int, manifest: DatasetManifest
    ) -> None:
        places = json.loads((directory / PARTS_FILE).read_bytes())
        self._parts = [
            TokenDataset(
                Path(places[part.name]), split, sequence_length=sequence_length, seed=source_seed(seed, part.name)
            )
            for part in manifest.mixture
        ]
        shards = [shard for part in self._parts for shard in part.shards]
        super().__init__(directory, split, sequence_length=sequence_length, seed=seed, manifest=manifest, shards=shards)
        self._first_of = list(accumulate((part.blocks for part in self._parts), initial=0))
        self.interleaving = interleaving_of(manifest)

    def block_at(self, place: int) -> int:
        source, index = self.interleaving.place(place)
        return self._first_of[source] + self._parts[source].block_at(index)

    def require_batch(self, count: int) -> None:
        for part, most, mixed in zip(self._parts, self.interleaving.most(count), self.manifest.mixture, strict=True):
            if part.blocks < most:
                raise CorpusTooSmallError(
                    f"Source {mixed.name!r} of dataset {self.manifest.name!r} has {part.tokens:,} tokens to train on, "
                    f"which makes {part.blocks:,} sequences of {self.sequence_length} tokens; by its weight, "
                    f"{mixed.weight} of the sum, a batch of {count:,} takes up to {most:,}. Give it more text or a "
                    "smaller weight, or lower batch.sequences or batch.sequence_length."
                )


def source_seed(seed: int, name: str) -> int:
    """Return the seed of one source's order: two sources of as many examples are shuffled each in its own way."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big")
