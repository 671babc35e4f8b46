"""Instructions -> rows of tokens: whole examples packed into rows of equal length, and only answers to be learned.

The rule, computed when a split is opened: of each `WINDOW` examples in a row, the longest goes first, each into the
first row that has room for it; in a row they stand in the order of the source. What is left of a row is padding.
An example that is longer than a row is cut at its end, or left out if nothing of an answer remains; or all of these are
left out. Both are counted.

A row is int64. An id that is to be predicted is stored as it is. Any other is stored as `~id`, with `FIRST` added to
the id where an example, or the padding, begins.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import Rows, Split, TokenDataset, map_files

PACKING_RULE = "first fit by decreasing length in windows of 256; 1"
WINDOW = 256
FIRST = 1 << 32
"""Added to the id of a token that begins an example, which nothing before it predicts."""

TooLong = Literal["cut", "drop"]


class PackedTokens(TokenDataset):
    """One split of instructions: rows of `sequence_length` predictions, of which those of answers count."""

    def __init__(
        self,
        directory: Path,
        split: Split,
        *,
        sequence_length: int,
        manifest: DatasetManifest,
        seed: int = 0,
        too_long: TooLong = "cut",
    ) -> None:
        super().__init__(directory, split, sequence_length=sequence_length, seed=seed, manifest=manifest)
        width = sequence_length + 1
        self._scored = map_files(directory, split, manifest, "scored", np.uint8)
        self.left_out = {"cut": 0, "dropped": 0}
        numbers, starts, lengths = list[Rows](), list[Rows](), list[Rows]()
        for number, shard_ends in enumerate(map_files(directory, split, manifest, "ends", np.uint64)):
            ends = shard_ends.astype(np.int64)
            begins = np.concatenate([[0], ends[:-1]])
            sizes, kept = ends - begins, np.ones(len(ends), dtype=bool)
            for example in np.flatnonzero(sizes > width).tolist():
                start = begins[example]
                kept[example] = too_long == "cut" and self._scored[number][start + 1 : start + width].any()
            self.left_out["cut"] += int((kept & (sizes > width)).sum())
            self.left_out["dropped"] += int((~kept).sum())
            numbers.append(np.full(kept.sum(), number))
            starts.append(begins[kept])
            lengths.append(np.minimum(sizes[kept], width))
        rows = pack(np.concatenate(lengths), width)
        order = np.argsort(rows, kind="stable")
        self._shard_of, self._starts, self._lengths = (np.concatenate(x)[order] for x in (numbers, starts, lengths))
        self.blocks = int(rows.max(initial=-1)) + 1
        self._first_of_row = np.searchsorted(rows[order], np.arange(self.blocks + 1))

    def _too_small(self, needed: int) -> str:
        dropped = f", beside {self.left_out['dropped']:,} that are too long" if self.left_out["dropped"] else ""
        return (
            f"The {self.split} split of dataset {self.manifest.name!r} has {len(self._starts):,} examples{dropped}. "
            f"They fill {self.blocks:,} sequences of {self.sequence_length} tokens; {needed:,} are needed. Remedies: "
            "give more of them, lower batch.sequences or batch.sequence_length, score fewer sequences, or change "
            "data.validation_fraction."
        )

    def _gather(self, blocks: list[int]) -> Rows:
        out: Rows = np.full((len(blocks), self._width), ~self.manifest.eos_id, dtype=self.dtype)
        for row, block in zip(out, blocks, strict=True):
            place = 0
            for example in range(self._first_of_row[block], self._first_of_row[block + 1]):
                shard, start, size = self._shard_of[example], self._starts[example], self._lengths[example]
                ids = self._shards[shard][start : start + size].astype(np.int64)
                row[place : place + size] = np.where(self._scored[shard][start : start + size], ids, ~ids)
                row[place] = ~(ids[0] + FIRST)
                place += size
            if place < self._width:
                row[place] -= FIRST
        return out


def pack(sizes: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Return the row of each example by the rule above, for sizes up to `width`. All windows are packed side by side.

    250,000 examples take 0.1 s.
    """
    windows = -(-len(sizes) // WINDOW)
    padded = np.zeros(windows * WINDOW, dtype=np.int64)
    padded[: len(sizes)] = sizes
    table = padded.reshape(windows, WINDOW)
    order = np.argsort(-table, axis=1, kind="stable")
    room = np.full((windows, WINDOW), width, dtype=np.int64)  # a row for each example, which always suffices
    found = np.zeros((windows, WINDOW), dtype=np.int64)
    every = np.arange(windows)
    for rank in range(WINDOW):
        example = order[:, rank]
        size = table[every, example]
        row = (room >= size[:, None]).argmax(axis=1)
        room[every, row] -= size
        found[every, example] = row
    used = (room < width).sum(axis=1)  # rows are used from the first on
    found += (np.cumsum(used) - used)[:, None]
    return found.reshape(-1)[: len(sizes)]
