"""Staged examples -> shards: the tokens, and beside them what ends where, what is learned, and which class it is.

`shard-00000.bin` holds ids as for plain texts. `.ends` holds uint64: where each example ends in the shard; of a pair,
where each of its texts ends. `.scored` holds a byte for each token of instructions: 1 if it belongs to an answer.
`.labels` holds uint16: the class of each labelled text. All are little-endian.

Messages are encoded as one text, as `apply_chat_template` does, and a token that touches an answer is learned. A prompt
and its completion are encoded each by itself, the prompt after BOS where documents begin so, the completion before the
separator, which is learned too. A labelled text has neither BOS nor separator: a reader adds them.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from relora_train.checkpoints.example_format import ExampleFormat
from relora_train.checkpoints.manifest import FileEntry
from relora_train.data.chat import BROKEN
from relora_train.data.engines import Engine, make_chat_encoder, make_encoder
from relora_train.data.records import class_order
from relora_train.data.shards import ShardPlan, ShardRecord, record_shard
from relora_train.data.staging import StagedCorpus, StagedRange, read_pieces
from relora_train.data.tokenizer import DocumentTokenizer
from relora_train.errors import DataError
from relora_train.settings.data import DataConfig
from relora_train.storage.durable import replace_durably

_BATCH_BYTES = 1 << 18

Ids = NDArray[np.uint32]


class ExampleEncoder:
    """The way from the parts of examples to their tokens."""

    def __init__(self, tokenizer: DocumentTokenizer, engine: Engine, examples: ExampleFormat) -> None:
        self._examples = examples
        self._classes = {name: number for number, name in enumerate(examples.classes)}
        self._bos, self._eos = (np.array(ids, dtype=np.uint32) for ids in (tokenizer.bos_ids, [tokenizer.eos_id]))
        if examples.kind == "messages":
            self._chat = make_chat_encoder(tokenizer, engine)
        else:
            self._encode = make_encoder(tokenizer, engine)

    def encode(self, batch: list[list[str]]) -> Iterator[tuple[list[Ids], NDArray[np.uint8] | None, int | None]]:
        """Yield, for each example, its texts as ids, which of them are learned, and its class."""
        kind = self._examples.kind
        if kind == "messages":
            yield from self._conversations(batch)
            return
        texts = 2 if kind == "prompts" or self._examples.pairs else 1
        flat = self._encode([text for parts in batch for text in parts[:texts]])
        for number, parts in enumerate(batch):
            found = flat[number * texts : (number + 1) * texts]
            if kind == "labels":
                yield found, None, self._classes[parts[-1]]
            else:
                prompt, answer = np.concatenate([self._bos, found[0]]), np.concatenate([found[1], self._eos])
                scored = np.repeat(np.array([0, 1], np.uint8), [len(prompt), len(answer)])
                yield [np.concatenate([prompt, answer])], scored, None

    def _conversations(self, batch: list[list[str]]) -> Iterator[tuple[list[Ids], NDArray[np.uint8], None]]:
        """Yield each conversation's ids, and 1 for each that touches an answer: parts 1, 3, … of the text."""
        pieces = [text.split(BROKEN) for text in map("".join, batch)]
        ids, places = self._chat([piece for of_one in pieces for piece in of_one])
        # The places leave BROKEN out, so the parts' ends do too.
        bounds = np.cumsum([0, *(len(part.replace(BROKEN, "").encode()) for parts in batch for part in parts)])
        answers = np.flatnonzero([number % 2 for parts in batch for number in range(len(parts))])
        first = np.searchsorted(places[:, 1], bounds[answers], side="right")  # the first that ends inside
        after = np.searchsorted(places[:, 0], bounds[answers + 1], side="left")  # the first that begins behind
        scored = np.zeros(len(places), dtype=np.uint8)
        for start, end in zip(first.tolist(), after.tolist(), strict=True):
            scored[start:end] = 1
        begin, taken = 0, 0
        for of_one in pieces:
            own = np.concatenate(ids[taken : taken + len(of_one)])
            yield [own], scored[begin : begin + len(own)], None
            begin, taken = begin + len(own), taken + len(of_one)


def write_example_shard(plan: ShardPlan, encoder: ExampleEncoder, staged: StagedRange) -> ShardRecord:
    """Make one shard of examples, in memory bounded by its tokens."""
    tokens, scored, labels, ends, size = list[Ids](), list[NDArray[np.uint8]](), list[int](), list[int](), 0
    for batch in _batches(plan, staged):
        for texts, learned, label in encoder.encode(batch):
            for ids in texts:
                tokens.append(ids.astype(plan.dtype))
                size += len(ids)
                ends.append(size)
            if learned is not None:
                scored.append(learned)
            if label is not None:
                labels.append(label)
    contents = {"bin": np.concatenate(tokens).tobytes(), "ends": np.array(ends, dtype="<u8").tobytes()}
    if scored:
        contents["scored"] = np.concatenate(scored).tobytes()
    if labels:
        contents["labels"] = np.array(labels, dtype="<u2").tobytes()
    name, files = f"{staged.split}/shard-{staged.index:05d}", list[FileEntry]()
    for ending, content in contents.items():
        part = plan.output_directory / staged.split / f".shard-{staged.index:05d}.part"
        part.write_bytes(content)
        replace_durably(part, plan.output_directory / f"{name}.{ending}")
        digest = hashlib.sha256(content).hexdigest()
        files.append(FileEntry(path=f"{name}.{ending}", size_bytes=len(content), sha256=digest))
    return record_shard(plan, staged, size, tuple(files))


def _batches(plan: ShardPlan, staged: StagedRange) -> Iterator[list[list[str]]]:
    """Yield the parts of some examples at a time."""
    batch, parts, size = list[list[str]](), list[str](), 0
    for text, example_ends in read_pieces(plan.staged_directory, staged):
        parts.append(text)
        size += len(text)
        if example_ends:
            batch.append(parts)
            parts = []
            if size > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def example_format(corpus: StagedCorpus, data: DataConfig, tokenizer: DocumentTokenizer) -> ExampleFormat | None:
    """Return the format of a dataset's examples; None for plain texts. Raises DataError for a class not trained on."""
    if data.holds == "texts":
        return None
    for name, found in corpus.classes.items():
        if not found.train:
            raise DataError(
                f"Class {name!r} ({found.val} texts, the first in {found.first}) is held out whole, so nothing would "
                "teach it. Give more texts of it or none, name held-out files in data.validation_paths, or change "
                "data.validation_fraction."
            )
    before, between, after = tokenizer.frame()
    pairs = data.labels is not None and data.labels.text_pair_field is not None
    classes = class_order(corpus.classes)
    return ExampleFormat(kind=data.holds, before=before, between=between, after=after, pairs=pairs, classes=classes)
