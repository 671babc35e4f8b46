"""Shards -> batches. A batch is a pure function of (dataset, seed, position): resuming costs nothing.

ExampleDataset is what all objectives have in common, TokenDataset reads text, ImageDataset images.

Block i of a shard is its tokens [i*L : i*L + L + 1]: L inputs and, shifted by one, the L tokens to predict. Blocks
start L apart, so every token of a shard but its first is predicted exactly once. The sequence length is chosen when
reading, without tokenizing again. The rest after a shard's last block, fewer than L + 1 tokens, is not used.

Any number of ranks reads the same global batch: rank r of w takes rows r, r + w, r + 2w, ... of it, so that shares
differ by one row at most.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from relora_train.checkpoints.manifest import MANIFEST_NAME, DatasetManifest, parse_manifest
from relora_train.data.masking import Masking
from relora_train.errors import CheckpointCorruptError, CheckpointIncompleteError, CorpusTooSmallError, DataError

Split = Literal["train", "val"]
Rows = NDArray[Any]
"""Examples, one a row of integers."""


def sample_order(seed: int, epoch: int, blocks: int) -> NDArray[np.int64]:
    """Return each block exactly once, in the order of this epoch: PCG64([seed, epoch]).permutation(blocks)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(blocks)


def read_dataset_manifest(directory: Path) -> DatasetManifest:
    """Return the manifest of a fetched dataset. Raises CheckpointIncompleteError when there is none."""
    # In a store that is a directory, an attempt that came second lies one level below the manifest it shares.
    places = [directory, directory.parent] if directory.name.startswith("variant-") else [directory]
    for path in (place / MANIFEST_NAME for place in places):
        if path.is_file():
            return parse_manifest(DatasetManifest, path.read_bytes(), uri=path.as_uri())
    raise CheckpointIncompleteError(
        f"{directory} has no {MANIFEST_NAME}: it is no dataset, or its preparation never finished. "
        "Prepare the dataset again, or name the directory that holds the manifest."
    )


class ExampleDataset(ABC):
    """One split of a dataset as numbered examples of equal length; which ones a batch holds follows from its position.

    Shards are memory-mapped: opening costs milliseconds and no memory, whatever the size. Their digests are checked
    by whoever fetched them; here only sizes are.
    """

    dtype: type[np.int64] | type[np.uint8]

    def __init__(
        self,
        directory: Path,
        split: Split,
        manifest: DatasetManifest,
        *,
        seed: int,
        stride: int,
        width: int,
        shards: list[Rows] | None = None,
    ) -> None:
        """Examples begin `stride` numbers apart in a shard and are `width` long. shards: instead of the directory's."""
        self.manifest, self.directory, self.split, self.seed = manifest, directory, split, seed
        self._stride, self._width = stride, width
        self._shards = map_shards(directory, split, manifest) if shards is None else shards
        sizes = (max(0, len(shard) - (width - stride)) // stride for shard in self._shards)
        self._first_block = np.cumsum([0, *sizes])  # of each shard, then the total
        self.blocks = int(self._first_block[-1])
        """Examples in an epoch."""
        self.left_out: dict[str, int] = {}
        """The examples longer than a row, by fate: 'cut', or 'dropped' into no row. Empty where none can be."""
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self.masking: Masking | None = None
        """Hides tokens of what is read, by its place in training or its number in evaluation."""

    @abstractmethod
    def _too_small(self, needed: int) -> str:
        """Say what there is, what is needed, and what to do."""

    def require(self, count: int) -> None:
        """Return only if one epoch holds this many examples; else CorpusTooSmallError with what to do."""
        if self.blocks < count:
            raise CorpusTooSmallError(self._too_small(count))

    def require_batch(self, count: int) -> None:
        """Return only if no batch of so many examples holds one twice; else CorpusTooSmallError with what to do."""
        self.require(count)

    def block_at(self, place: int) -> int:
        """Return the number, in the order of the split, of the example at a place of the shuffled epochs."""
        epoch, index = divmod(place, self.blocks)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, sample_order(self.seed, epoch, self.blocks))
        return int(self._order[1][index])

    def read_batch(self, position: int, count: int, *, rank: int = 0, world_size: int = 1) -> Rows:
        """Return this rank's rows of the global batch at `position`, counted in examples since the start of training.

        The global batch is the examples at positions [position, position + count) of the shuffled epochs laid end
        to end. Returns (count / world_size rounded up or down, row length). Raises CorpusTooSmallError when an epoch is
        smaller than a batch, which would show an example twice in one update.
        """
        if count < world_size:
            raise ValueError(f"a batch of {count} sequences cannot be shared by {world_size} ranks")
        self.require_batch(count)
        places = range(position + rank, position + count, world_size)
        rows = self._gather([self.block_at(place) for place in places])
        draws = [(self.seed, place, 1) for place in places]  # two numbers seed an order
        return self.masking.hide(rows, draws) if self.masking else rows

    def read_blocks(self, start: int, count: int) -> Rows:
        """Return examples start … start + count - 1 in the order of the split: (count, row length), for evaluation."""
        self.require(start + count)
        return self._evaluated(list(range(start, start + count)))

    def read_spread(self, start: int, count: int, *, of: int) -> Rows:
        """Return samples start … start + count - 1 of `of` examples spread evenly over the split: (count, row length).

        None is among them twice, so a part of the split stands for all of it and nothing is scored twice.
        """
        self.require(of)
        return self._evaluated([sample * self.blocks // of for sample in range(start, start + count)])

    def _evaluated(self, blocks: list[int]) -> Rows:
        rows = self._gather(blocks)
        return self.masking.hide(rows, [(block,) for block in blocks]) if self.masking else rows

    def _gather(self, blocks: list[int]) -> Rows:
        out: Rows = np.empty((len(blocks), self._width), dtype=self.dtype)
        shards = np.searchsorted(self._first_block, blocks, side="right") - 1
        inside = np.asarray(blocks) - self._first_block[shards]
        # One slice a row: faster than fancy indexing as soon as a batch touches many shards.
        for row, shard, block in zip(out, shards.tolist(), inside.tolist(), strict=True):
            start = block * self._stride
            row[:] = self._shards[shard][start : start + self._width]
        return out


class TokenDataset(ExampleDataset):
    """One split of a dataset of text, cut into blocks of `sequence_length` predictions: int64, one more token a row.

    Blocks do not overlap in what they predict, so reading all of them scores every token at most once. `manifest` is
    read from the directory when absent.
    """

    dtype = np.int64

    def __init__(
        self,
        directory: Path,
        split: Split,
        *,
        sequence_length: int,
        seed: int = 0,
        manifest: DatasetManifest | None = None,
        shards: list[Rows] | None = None,
    ) -> None:
        self.sequence_length = sequence_length
        manifest, cut = manifest or read_dataset_manifest(directory), {"stride": sequence_length}
        super().__init__(directory, split, manifest, seed=seed, width=sequence_length + 1, shards=shards, **cut)

    @property
    def shards(self) -> list[Rows]:
        """The tokens of each shard."""
        return self._shards

    @property
    def tokens(self) -> int:
        """Tokens in the split, end-of-text tokens included."""
        return self.manifest.train_tokens if self.split == "train" else self.manifest.val_tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text behind one token of this split, end-of-text tokens counted as tokens of no bytes."""
        size = self.manifest.train_bytes if self.split == "train" else self.manifest.val_bytes
        return size / self.tokens

    def _too_small(self, needed: int) -> str:
        length, largest = self.sequence_length, max((len(shard) for shard in self._shards), default=0)
        remedies = "use more text or a shorter batch.sequence_length"
        if needed > 1:
            remedies += ", or lower batch.sequences" if self.split == "train" else ", or score fewer sequences"
        if self.split == "val":
            remedies += ", or raise data.validation_fraction"
        if len(self._shards) > 1 and largest <= 4 * length:
            remedies += ", or raise data.shard_tokens: a sequence never spans two shards"
        return (
            f"The {self.split} split of dataset {self.manifest.name!r} has {self.tokens:,} tokens in "
            f"{len(self._shards)} shards, which makes {self.blocks:,} sequences of {length} tokens; "
            f"{needed:,} are needed. Remedies: {remedies}."
        )


class ImageDataset(ExampleDataset):
    """One split of a dataset of images: uint8 (examples, channels * size * size + 1).

    An example is a row of bytes: the pixels by channel, row and column, and the class last.
    """

    dtype = np.uint8

    def __init__(self, directory: Path, split: Split, *, seed: int = 0) -> None:
        manifest = read_dataset_manifest(directory)
        if manifest.images is None:
            raise DataError(
                f"Dataset {manifest.name!r} in {directory} holds text, no images. Set data.source to a source of "
                "images, or objective to 'causal_lm'."
            )
        self.format = manifest.images
        size = self.format.row_bytes
        super().__init__(directory, split, manifest, seed=seed, stride=size, width=size)

    def _too_small(self, needed: int) -> str:
        remedies = "use more images"
        if needed > 1:
            remedies += ", or lower batch.sequences" if self.split == "train" else ", or score fewer of them"
        return (
            f"The {self.split} split of dataset {self.manifest.name!r} has {self.blocks:,} images; {needed:,} are "
            f"needed. Remedies: {remedies}, or change data.validation_fraction."
        )


def map_shards(directory: Path, split: Split, manifest: DatasetManifest) -> list[Rows]:
    """Return the shards of a split in order, memory-mapped, each as one row of numbers."""
    return map_files(directory, split, manifest, "bin", np.dtype(manifest.token_dtype))


def map_files(directory: Path, split: Split, manifest: DatasetManifest, ending: str, kind: DTypeLike) -> list[Rows]:
    """Return the files of a split that have this ending, in order of the shards, memory-mapped as little-endian."""
    dtype = np.dtype(kind).newbyteorder("<")
    entries = [e for e in manifest.files if e.path.startswith(f"{split}/") and e.path.endswith(f".{ending}")]
    shards = []
    for entry in sorted(entries, key=lambda entry: entry.path):
        path = directory / entry.path
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise CheckpointIncompleteError(
                f"{path} is listed in the dataset's manifest but is not there; fetch it again."
            )
        if found != entry.size_bytes or found % dtype.itemsize:
            raise CheckpointCorruptError(
                f"{path} has {found} bytes, its manifest says {entry.size_bytes}. Delete it and fetch it again."
            )
        # A plain array over the mapping: np.memmap's own slicing costs several times the copy.
        shards.append(np.asarray(np.memmap(path, dtype=dtype, mode="r")) if found else np.empty(0, dtype))
    return shards
