"""Labelled texts, and prompts with completions -> one row each, padded to equal length.

A text is read whole, framed by what its tokenizer puts around it (manifest.examples). What is longer than a row is cut
inside that frame, or left out, and counted: a text at its end; of two texts the longer one until both are as long, then
both (`longest_first` of tokenizers).
"""

from pathlib import Path

import numpy as np

from relora_train.checkpoints.example_format import ExampleFormat
from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import ExampleDataset, Rows, Split, map_files, read_dataset_manifest
from relora_train.data.packed_dataset import TooLong
from relora_train.errors import DataError

PADDING = -1
"""Stands in a row where there is no token."""


class _PaddedDataset(ExampleDataset):
    """One split of examples that have two parts, of which the second may be empty."""

    dtype = np.int64

    def __init__(
        self, directory: Path, split: Split, kind: str, *, width: int, seed: int, manifest: DatasetManifest | None
    ) -> None:
        manifest = manifest or read_dataset_manifest(directory)
        if manifest.examples is None or manifest.examples.kind != kind:
            section = "labels" if kind == "labels" else "instructions with prompt and completion"
            raise DataError(
                f"Dataset {manifest.name!r} in {directory} holds no {section}, from which this objective learns. Set "
                f"data.{section}, or another objective."
            )
        self.format: ExampleFormat = manifest.examples
        super().__init__(directory, split, manifest, seed=seed, stride=1, width=width)
        self.left_out = {"cut": 0, "dropped": 0}

    def _place(self, first: list[Rows], second: list[Rows], begins: list[Rows], fits: list[Rows], drop: bool) -> None:
        """Keep where the parts of each example lie."""
        kept = [fit if drop else np.ones_like(fit) for fit in fits]
        over = sum(int((~fit).sum()) for fit in fits)
        self.left_out["dropped" if drop else "cut"] = over
        self._first, self._second, self._begins = (
            np.concatenate([one[keep] for one, keep in zip(parts, kept, strict=True)])
            for parts in (first, second, begins)
        )
        self._shard_of = np.concatenate([np.full(keep.sum(), number) for number, keep in enumerate(kept)])
        self._number = np.concatenate([np.flatnonzero(keep) for keep in kept])
        self.blocks = len(self._begins)

    def _parts(self, example: int) -> tuple[Rows, Rows]:
        shard, begin = self._shards[self._shard_of[example]], self._begins[example]
        middle = begin + self._first[example]
        return shard[begin:middle], shard[middle : middle + self._second[example]]

    def _too_small(self, needed: int) -> str:
        return (
            f"The {self.split} split of dataset {self.manifest.name!r} has {self.blocks:,} examples"
            + (f" beside {self.left_out['dropped']:,} that are too long" if self.left_out["dropped"] else "")
            + f"; {needed:,} are needed. Remedies: give more of them, lower batch.sequences, score fewer sequences, or "
            "change data.validation_fraction."
        )


class LabelledTexts(_PaddedDataset):
    """Rows of `sequence_length` ids, PADDING at their end, and the class last."""

    def __init__(
        self,
        directory: Path,
        split: Split,
        *,
        sequence_length: int,
        seed: int = 0,
        too_long: TooLong = "cut",
        manifest: DatasetManifest | None = None,
    ) -> None:
        super().__init__(directory, split, "labels", width=sequence_length + 1, seed=seed, manifest=manifest)
        form, manifest = self.format, self.manifest
        frame = len(form.before) + len(form.after) + (len(form.between) if form.pairs else 0)
        self._room = sequence_length - frame
        self._labels = map_files(directory, split, manifest, "labels", np.uint16)
        first, second, begins, fits = list[Rows](), list[Rows](), list[Rows](), list[Rows]()
        for shard_ends in map_files(directory, split, manifest, "ends", np.uint64):
            ends = shard_ends.astype(np.int64)
            sizes = np.diff(ends, prepend=0).reshape(-1, 2 if form.pairs else 1)
            first.append(sizes[:, 0])
            second.append(sizes[:, 1] if form.pairs else np.zeros(len(sizes), dtype=np.int64))
            begins.append(np.concatenate([[0], ends])[: -1 : sizes.shape[1]])
            fits.append(sizes.sum(axis=1) <= self._room)
        self._place(first, second, begins, fits, too_long == "drop")

    def _gather(self, blocks: list[int]) -> Rows:
        out: Rows = np.full((len(blocks), self._width), PADDING, dtype=self.dtype)
        form = self.format
        for row, example in zip(out, blocks, strict=True):
            text, pair = self._parts(example)
            sizes = longest_first(len(text), len(pair), self._room)
            ids = [form.before, text[: sizes[0]], *((form.between, pair[: sizes[1]]) if form.pairs else ()), form.after]
            joined = np.concatenate([np.asarray(part, dtype=np.int64) for part in ids])
            row[: len(joined)] = joined
            row[-1] = self._labels[self._shard_of[example]][self._number[example]]
        return out


class PromptPairs(_PaddedDataset):
    """Rows of `sequence_length` ids of the prompt, then `target_length` of the completion, each padded at its end."""

    def __init__(
        self,
        directory: Path,
        split: Split,
        *,
        sequence_length: int,
        target_length: int,
        seed: int = 0,
        too_long: TooLong = "cut",
        manifest: DatasetManifest | None = None,
    ) -> None:
        width = sequence_length + target_length
        super().__init__(directory, split, "prompts", width=width, seed=seed, manifest=manifest)
        self.sequence_length, self.target_length = sequence_length, target_length
        self._room = sequence_length - len(self.format.after)
        first, second, begins, fits = list[Rows](), list[Rows](), list[Rows](), list[Rows]()
        scored = map_files(directory, split, self.manifest, "scored", np.uint8)
        for shard_ends, answers in zip(
            map_files(directory, split, self.manifest, "ends", np.uint64), scored, strict=True
        ):
            ends = shard_ends.astype(np.int64)
            begin = np.concatenate([[0], ends[:-1]])
            answer = np.add.reduceat(answers, begin, dtype=np.int64)
            first.append(ends - begin - answer)
            second.append(answer)
            begins.append(begin)
            fits.append((first[-1] <= self._room) & (answer <= target_length))
        self._place(first, second, begins, fits, too_long == "drop")

    def _gather(self, blocks: list[int]) -> Rows:
        out: Rows = np.full((len(blocks), self._width), PADDING, dtype=self.dtype)
        length = self.sequence_length
        for row, example in zip(out, blocks, strict=True):
            prompt, answer = self._parts(example)
            source = np.concatenate([prompt[: self._room].astype(np.int64), np.array(self.format.after, np.int64)])
            row[: len(source)] = source
            target = answer[: self.target_length]
            row[length : length + len(target)] = target
        return out


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how much of two texts fits into so many tokens, the longer one cut first; of a rest it has one more."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (room - shorter, shorter) if first > second else (shorter, room - shorter)
