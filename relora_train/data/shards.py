"""Staged ranges -> token shards, by any number of processes. Range i of a split becomes shard i of it.

`shard-00000.bin` holds little-endian uint16 ids (uint32 for more than 65,536 entries). `shard-00000.len` holds the
uint32 length in tokens of each document in it, separator and BOS included. A document cut by a shard's end counts in
both.
The shards of instructions and labelled texts have other files instead of `.len`: see example_shards.py.
A shard's bytes depend on its range, the tokenizer and nothing else. A shard is there completely or not at all, and a
record beside the work tells that it is done: a killed preparation redoes only the shards it was making.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from relora_train.checkpoints.example_format import ExampleFormat
from relora_train.checkpoints.manifest import FileEntry
from relora_train.data.engines import Encode, Engine, make_encoder
from relora_train.data.splitting import Split
from relora_train.data.staging import StagedRange, read_pieces
from relora_train.data.tokenizer import DocumentTokenizer
from relora_train.errors import DataError
from relora_train.settings.base import FrozenConfig
from relora_train.storage.durable import replace_durably, write_durably

# An encoding of `tokenizers` takes half a kilobyte a token: 150 MB if every byte of a batch becomes one.
_BATCH_BYTES = 1 << 18


class ShardRecord(FrozenConfig):
    """A finished shard."""

    split: Split
    index: int
    tokens: int
    documents: int
    text_bytes: int
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class ShardPlan:
    """The facts that every worker needs, once."""

    tokenizer: DocumentTokenizer
    engine: Engine
    staged_directory: Path
    output_directory: Path
    record_directory: Path
    examples: ExampleFormat | None = None
    """None for plain texts."""

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        return np.dtype("<u2") if self.tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")

    def record_path(self, staged: StagedRange) -> Path:
        return self.record_directory / f"{staged.name}.json"


def write_shards(
    plan: ShardPlan, ranges: tuple[StagedRange, ...], *, workers: int, on_shard: Callable[[int, bool], None]
) -> list[ShardRecord]:
    """Make every shard that is not there yet; return the records of all, in the order of `ranges`.

    on_shard is told the text bytes of each shard and whether it was made now. The text of a finished range is deleted.
    Raises DataError when a worker process dies.
    """
    for directory in (plan.record_directory, *(plan.output_directory / split for split in ("train", "val"))):
        directory.mkdir(parents=True, exist_ok=True)
    done = {staged: record for staged in ranges if (record := finished_record(plan, staged))}
    for record in done.values():
        on_shard(record.text_bytes, False)
    if pending := [staged for staged in ranges if staged not in done]:
        workers = min(workers, len(pending))
        # Spawned, never forked: the threads of `tokenizers` would not survive a fork.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(plan,))
        try:
            futures = {pool.submit(_work, staged): staged for staged in pending}
            for future in as_completed(futures):
                record = done[futures[future]] = future.result()
                on_shard(record.text_bytes, True)
        except BrokenProcessPool:
            raise DataError(
                f"One of {workers} tokenizing processes died, killed by the system or a user; where memory is short "
                "the system does that. Lower data.workers and run again: finished shards are kept."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [done[staged] for staged in ranges]


_write_in_worker: Callable[[StagedRange], ShardRecord]  # set once in every worker


def _start_worker(plan: ShardPlan) -> None:
    global _write_in_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _write_in_worker = shard_writer(plan)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(staged: StagedRange) -> ShardRecord:
    return _write_in_worker(staged)


def shard_writer(plan: ShardPlan) -> Callable[[StagedRange], ShardRecord]:
    """Return the function that makes one shard of a range."""
    if plan.examples is None:
        return partial(write_shard, plan, make_encoder(plan.tokenizer, plan.engine))
    from relora_train.data.example_shards import ExampleEncoder, write_example_shard

    return partial(write_example_shard, plan, ExampleEncoder(plan.tokenizer, plan.engine, plan.examples))


def write_shard(plan: ShardPlan, encode: Encode, staged: StagedRange) -> ShardRecord:
    """Make one shard in bounded memory, whatever its size."""
    name = f"{staged.split}/shard-{staged.index:05d}"
    part = plan.output_directory / staged.split / f".shard-{staged.index:05d}.part"
    lengths: list[int] = []
    digest, size = hashlib.sha256(), 0
    bos = np.array(plan.tokenizer.bos_ids, dtype=np.uint32)
    begins = staged.begins_document
    unfinished = 0  # tokens so far of a document whose end has not come
    with part.open("wb") as stream:
        for batch in _batches(read_pieces(plan.staged_directory, staged)):
            ids = encode([text for text, _ in batch])
            arrays: list[NDArray[np.uint32]] = []
            for piece, (_, document_ends) in zip(ids, batch, strict=True):
                if begins:
                    arrays.append(bos)
                    unfinished += len(bos)
                begins = document_ends
                arrays.append(piece)
                unfinished += len(piece)
                if document_ends:
                    arrays.append(np.array([plan.tokenizer.eos_id], dtype=np.uint32))
                    lengths.append(unfinished + 1)
                    unfinished = 0
            raw_tokens = np.concatenate(arrays).astype(plan.dtype).tobytes()
            stream.write(raw_tokens)
            digest.update(raw_tokens)
            size += len(raw_tokens)
    replace_durably(part, plan.output_directory / f"{name}.bin")
    if unfinished:
        lengths.append(unfinished)
    raw_lengths = np.array(lengths, dtype="<u4").tobytes()
    write_durably(plan.output_directory / f"{name}.len", raw_lengths)
    files = (
        FileEntry(path=f"{name}.bin", size_bytes=size, sha256=digest.hexdigest()),
        FileEntry(path=f"{name}.len", size_bytes=len(raw_lengths), sha256=hashlib.sha256(raw_lengths).hexdigest()),
    )
    return record_shard(plan, staged, size // plan.dtype.itemsize, files)


def record_shard(plan: ShardPlan, staged: StagedRange, tokens: int, files: tuple[FileEntry, ...]) -> ShardRecord:
    """Write the record that says a shard is done, and free its text."""
    record = ShardRecord(
        split=staged.split,
        index=staged.index,
        tokens=tokens,
        documents=staged.documents,
        text_bytes=staged.text_bytes,
        files=files,
    )
    write_durably(plan.record_path(staged), record.model_dump_json().encode())
    for ending in ("text", "pieces"):  # frees the disk
        (plan.staged_directory / f"{staged.name}.{ending}").unlink(missing_ok=True)
    return record


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for text, document_ends in pieces:
        text_bytes = len(text.encode())
        if batch and size + text_bytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((text, document_ends))
        size += text_bytes
    if batch:
        yield batch


def finished_record(plan: ShardPlan, staged: StagedRange) -> ShardRecord | None:
    """Return the record of a shard that an earlier attempt finished, if its files are there."""
    path = plan.record_path(staged)
    if not path.is_file():
        return None
    record = ShardRecord.model_validate_json(path.read_bytes())
    for entry in record.files:
        found = plan.output_directory / entry.path
        if not found.is_file() or found.stat().st_size != entry.size_bytes:
            return None
    return record
