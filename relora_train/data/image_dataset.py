"""Image shards -> batches: an example is a row of bytes, the pixels by channel, row and column, and the class last."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from relora_train.data.dataset import ExampleDataset, Rows, Split, read_dataset_manifest
from relora_train.errors import DataError


class ImageDataset(ExampleDataset):
    """One split of a dataset of images: uint8 (examples, channels * size * size + 1)."""

    def __init__(self, directory: Path, split: Split, *, seed: int = 0) -> None:
        manifest = read_dataset_manifest(directory)
        if manifest.images is None:
            raise DataError(
                f"Dataset {manifest.name!r} in {directory} holds text, no images. Set data.source to a source of "
                "images, or objective to 'causal_lm'."
            )
        self.format = manifest.images
        super().__init__(directory, split, manifest, seed=seed)

    def _blocks_of(self, shard: Rows) -> int:
        return len(shard) // self.format.row_bytes

    def _read(self, shard: Rows, block: int, out: Rows) -> None:
        start = block * self.format.row_bytes
        out[:] = shard[start : start + self.format.row_bytes]

    def _empty(self, count: int) -> Rows:
        return np.empty((count, self.format.row_bytes), dtype=np.uint8)

    def _too_small(self, needed: int) -> str:
        remedies = "use more images"
        if needed > 1:
            remedies += ", or lower batch.sequences" if self.split == "train" else ", or score fewer of them"
        return (
            f"The {self.split} split of dataset {self.manifest.name!r} has {self.blocks:,} images; {needed:,} are "
            f"needed. Remedies: {remedies}, or change data.validation_fraction."
        )
