"""Ranges encoded on other machines: text and shards go through a store, below a prefix that no reader knows.

This machine reads the source and cuts it into ranges, so sources of any kind will do, and the ranges are those of a
preparation on one machine. Whoever encodes a range needs the store, this library and the credentials of its own
environment. Encoded twice, a range gives the same bytes: a worker that is lost costs what it had not put there.
"""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from relora_train.checkpoints.example_format import ExampleFormat
from relora_train.checkpoints.fetch import check_file
from relora_train.checkpoints.layout import preparing_prefix
from relora_train.data.engines import Engine
from relora_train.data.meter import Meter, OnProgress
from relora_train.data.shards import ShardPlan, ShardRecord, finished_record, shard_writer
from relora_train.data.staging import StagedRange, read_index
from relora_train.data.tokenizer import DocumentTokenizer
from relora_train.errors import ConfigError, StorageError
from relora_train.settings.base import FrozenConfig
from relora_train.storage.base import ObjectStore
from relora_train.storage.durable import replace_durably, write_durably
from relora_train.storage.opening import open_store

ENCODING_FILE = "encoding.json"
_ENCODERS = ("tokenizers", "tiktoken", "numpy")


class Encoding(FrozenConfig):
    """The facts by which any machine makes the shard of a range."""

    json_text: str
    eos_token: str
    eos_id: int
    vocab_size: int
    bos_ids: tuple[int, ...]
    engine: Engine
    examples: ExampleFormat | None
    versions: dict[str, str]
    """Those of the libraries that encode: others may give other ids."""

    @classmethod
    def of(cls, plan: ShardPlan) -> "Encoding":
        names = ("json_text", "eos_token", "eos_id", "vocab_size", "bos_ids")
        facts = {name: getattr(plan.tokenizer, name) for name in names}
        return cls(**facts, engine=plan.engine, examples=plan.examples, versions=_versions())

    def plan(self, home: Path) -> ShardPlan:
        """Return the plan of shards below a directory."""
        tokenizer = DocumentTokenizer(
            self.json_text, "", self.eos_token, self.eos_id, self.vocab_size, tuple(self.bos_ids)
        )
        return ShardPlan(tokenizer, self.engine, home / "staged", home / "dataset", home / "records", self.examples)


class RangeJob(FrozenConfig):
    """One range to encode. It names no credentials: they come from the environment of whoever encodes it."""

    store_uri: str
    prefix: str
    staged: StagedRange


MapRanges = Callable[[Iterable[RangeJob]], Iterator[tuple[RangeJob, ShardRecord]]]
"""Has each job done by `encode_range`, anywhere, and yields it when it is done, in any order."""


def encode_remotely(store: ObjectStore, home: Path, map_ranges: MapRanges, on_progress: OnProgress) -> None:
    """Make the shards of a staged dataset that are not there yet, wherever `map_ranges` has them made.

    home: a directory that `stage_dataset` filled. What passes through the store is removed at the end, also after an
    error; what a killed process left there goes when the preparation is repeated on this machine.
    """
    plan = Encoding.model_validate_json((home / ENCODING_FILE).read_bytes()).plan(home)
    for directory in (plan.record_directory, *(plan.output_directory / split for split in ("train", "val"))):
        directory.mkdir(parents=True, exist_ok=True)
    attempt = home / "attempt"
    if not attempt.is_file():
        write_durably(attempt, secrets.token_hex(8).encode())
    prefix, ranges = preparing_prefix(home.name, attempt.read_text()), read_index(plan.staged_directory).ranges
    pending = [staged for staged in ranges if finished_record(plan, staged) is None]
    meter = Meter("tokenize", sum(staged.text_bytes for staged in ranges), on_progress)
    meter.advance(sum(staged.text_bytes for staged in ranges if staged not in pending), worked=False)

    def jobs() -> Iterator[RangeJob]:
        for staged in pending:  # one after the other, while those before are encoded
            for name in _files_of(staged):
                store.put_file(f"{prefix}/{name}", plan.staged_directory / name)
            yield RangeJob(store_uri=store.uri, prefix=prefix, staged=staged)

    try:
        store.put_file(f"{prefix}/{ENCODING_FILE}", home / ENCODING_FILE)
        for job, record in map_ranges(jobs()) if pending else ():
            for entry in record.files:
                part = home / "part"
                store.get_file(f"{prefix}/{entry.path}", part)
                check_file(part, entry, uri=f"{store.uri}/{prefix}/{entry.path}")
                replace_durably(part, plan.output_directory / entry.path)
            write_durably(plan.record_path(job.staged), record.model_dump_json().encode())
            for name in _files_of(job.staged):
                (plan.staged_directory / name).unlink(missing_ok=True)
                store.delete(f"{prefix}/{name}")
            for entry in record.files:
                store.delete(f"{prefix}/{entry.path}")
            meter.advance(record.text_bytes)
        meter.tell()
    finally:
        with suppress(StorageError):  # of an outage the error that led here tells
            for info in list(store.list(f"{prefix}/")):
                store.delete(info.key)


def encode_range(job: RangeJob) -> ShardRecord:
    """Make the shard of one range from what lies in the store, and put it there. Safe to repeat, also at once.

    Raises ConfigError where other versions of the encoding libraries are installed than where the range was staged.
    """
    store, (home, write) = open_store(job.store_uri), _encoder(job.store_uri, job.prefix)
    for name in _files_of(job.staged):
        store.get_file(f"{job.prefix}/{name}", home / "staged" / name)
    record = write(job.staged)
    for entry in record.files:
        store.put_file(f"{job.prefix}/{entry.path}", home / "dataset" / entry.path)
        (home / "dataset" / entry.path).unlink()
    return record


@lru_cache(maxsize=1)
def _encoder(store_uri: str, prefix: str) -> tuple[Path, Callable[[StagedRange], ShardRecord]]:
    """Return this process's scratch directory, and what makes a shard in it: building that takes a second."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    home = Path(tempfile.mkdtemp(prefix="relora-encode-"))
    open_store(store_uri).get_file(f"{prefix}/{ENCODING_FILE}", home / ENCODING_FILE)
    encoding = Encoding.model_validate_json((home / ENCODING_FILE).read_bytes())
    if (here := _versions()) != encoding.versions:
        raise ConfigError(
            f"This worker encodes with {here}, and the flow with {encoding.versions}: the bytes could differ. "
            "Install the same versions on both (deploy/constraints.txt)."
        )
    plan = encoding.plan(home)
    for directory in ("staged", "records", "dataset/train", "dataset/val"):
        (home / directory).mkdir(parents=True)
    return home, shard_writer(plan)


def _files_of(staged: StagedRange) -> tuple[str, str]:
    return f"{staged.name}.text", f"{staged.name}.pieces"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _ENCODERS}
