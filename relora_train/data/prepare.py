"""Documents or images -> a dataset directory: tokenizer, training and validation shards, the manifest to commit.

The dataset's id is known before any text is tokenized, and the same inputs give the same bytes: on any machine, for
any number of workers, with either engine. Stopped anywhere, by SIGKILL too, preparation continues where it was.

`python -m relora_train.data.prepare --request FILE` (a PrepareRequest as JSON) runs it as a process. It imports torch
only to convert a tokenizer from older files, and needs the source's credentials.
"""

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from relora_train.checkpoints.manifest import DatasetManifest, FileEntry, hash_file, parse_manifest
from relora_train.data.dataset_changes import source_record
from relora_train.data.engines import choose_engine
from relora_train.data.example_shards import example_format
from relora_train.data.images import IMAGE_SOURCES, ImageInputs, resolve_images, write_images
from relora_train.data.left_out import left_out_note
from relora_train.data.meter import Meter, OnProgress
from relora_train.data.remote_shards import ENCODING_FILE, Encoding
from relora_train.data.selection import DatasetInputs, Selection, resolve_inputs
from relora_train.data.shards import ShardPlan, write_shards
from relora_train.data.sources import read_held_out
from relora_train.data.splitting import DOCUMENT_BYTES, Split
from relora_train.data.staging import StagedCorpus, read_pieces, read_sample, stage_both_sides
from relora_train.data.tokenizer import DocumentTokenizer, load_tokenizer, train_tokenizer
from relora_train.data.tokenizer_files import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, TOKENIZER_FILES
from relora_train.errors import CorpusEmptyError, CorpusTooSmallError, TrainerInterruptedError
from relora_train.process import PARENT_PIPE_VARIABLE, Emit, serve_request
from relora_train.settings.base import FrozenConfig
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.storage.durable import disk_error, locked, write_durably


class PreparedDataset(FrozenConfig):
    """A complete dataset on this machine's disk, not yet committed anywhere."""

    directory: Path
    manifest: DatasetManifest


class PrepareRequest(FrozenConfig):
    """Prepare one dataset in a process of its own."""

    data: DataConfig
    tokenizer: TokenizerConfig
    selection: Selection | None = None
    """The part of the source to take; all of it when absent."""
    stage_only: bool = False
    """Cut ranges for other machines to encode; no result is written."""
    work_directory: Path
    result_path: Path
    """The PreparedDataset as JSON."""


def describe_dataset(
    data: DataConfig, tokenizer: TokenizerConfig, *, selection: Selection | None = None
) -> tuple[str, dict[str, Any]]:
    """Return the dataset's id and all that is hashed into it, from the source alone: 0.1 s for a dozen megabytes.

    Files in a store are fetched to the cache for it, once. selection: what to take of the source; all when absent.
    Raises SourceUnreadableError, TokenizerError, StorageError.
    """
    found = _resolve(data, tokenizer, selection)
    return found.dataset_id, found.hashed()


def prepare_dataset(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    work_directory: Path,
    *,
    on_progress: OnProgress | None = None,
    selection: Selection | None = None,
) -> PreparedDataset:
    """Make the dataset below `work_directory`, or return at once the one that was finished there.

    Needs disk for the text, which is freed shard by shard, and for two bytes a token. One process works on a dataset
    at a time; another waits for it. Raises SourceUnreadableError, CorpusEmptyError, CorpusTooSmallError,
    TokenizerError, DataError and the errors of the source's store and of this disk.
    """
    found = _resolve(data, tokenizer, selection)
    with _home(found, work_directory) as home:
        directory, done = home / "dataset", home / "prepared.json"
        manifest = parse_manifest(DatasetManifest, done.read_bytes(), uri=done.as_uri()) if done.is_file() else None
        sizes = {file.relative_to(directory).as_posix(): file.stat().st_size for file in directory.rglob("*")}
        if manifest is None or any(sizes.get(entry.path) != entry.size_bytes for entry in manifest.files):
            done.unlink(missing_ok=True)
            directory.mkdir(exist_ok=True)
            if isinstance(found, ImageInputs):
                manifest = write_images(found, directory)
            else:
                manifest = _prepare_text(found, home, on_progress or (lambda progress: None))
            write_durably(done, manifest.to_bytes())
        for leftover in ("staged", "records"):
            shutil.rmtree(home / leftover, ignore_errors=True)
        return PreparedDataset(directory=directory, manifest=manifest)


def stage_dataset(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    work_directory: Path,
    *,
    on_progress: OnProgress | None = None,
    selection: Selection | None = None,
) -> None:
    """Do what prepare_dataset does until the ranges are cut and their encoding is known; see remote_shards.py."""
    found = resolve_inputs(data, tokenizer, selection)
    with _home(found, work_directory) as home:
        if not (home / "prepared.json").is_file():
            (home / "dataset").mkdir(exist_ok=True)
            _, plan = _stage(found, home, on_progress or (lambda progress: None))
            write_durably(home / ENCODING_FILE, Encoding.of(plan).model_dump_json().encode())


@contextmanager
def _home(found: DatasetInputs | ImageInputs, work_directory: Path) -> Iterator[Path]:
    """Yield the directory of a dataset's preparation, which no other process has meanwhile."""
    home = work_directory / home_name(found.data.name, found.dataset_id)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / "lock"):
            yield home
    except OSError as error:
        raise disk_error(error, f"prepare dataset {found.data.name!r} in {error.filename or home}") from error


def home_name(name: str, dataset_id: str) -> str:
    """Return the name of the directory in which a dataset is prepared."""
    return f"{name}-{dataset_id[:16]}"


def _resolve(data: DataConfig, tokenizer: TokenizerConfig, selection: Selection | None) -> DatasetInputs | ImageInputs:
    return resolve_images(data) if data.source in IMAGE_SOURCES else resolve_inputs(data, tokenizer, selection)


def _stage(found: DatasetInputs, home: Path, on_progress: OnProgress) -> tuple[StagedCorpus, ShardPlan]:
    """Read the source into ranges, and find out how they are encoded."""
    data, staged_directory = found.data, home / "staged"
    reading = Meter("read", found.source.size_bytes, on_progress)
    corpus = stage_both_sides(
        found.source.read(data.validation_fraction, reading.advance),
        partial(found.source.read, data.validation_fraction),
        staged_directory,
        validation_fraction=data.validation_fraction,
        range_bytes=data.shard_tokens,
        markers=1 + len(found.bos_ids),
        held_out=read_held_out(found.source.new) if data.validation_paths else None,
        left_out=found.source.new.left_out.facts,
        holds=data.holds,
        first_of_class=found.source.new.records.first_of_class,
    )
    reading.tell()
    _check_both_splits(corpus, data)
    tokenizer = _tokenizer(found, home, corpus, on_progress)
    engine = choose_engine(tokenizer, data.engine, read_sample(staged_directory))
    examples = example_format(corpus, data, tokenizer)
    return corpus, ShardPlan(tokenizer, engine, staged_directory, home / "dataset", home / "records", examples)


def _prepare_text(found: DatasetInputs, home: Path, on_progress: OnProgress) -> DatasetManifest:
    data, directory = found.data, home / "dataset"
    corpus, plan = _stage(found, home, on_progress)
    tokenizer, examples = plan.tokenizer, plan.examples
    tokenizing = Meter("tokenize", corpus.text_bytes("train") + corpus.text_bytes("val"), on_progress)
    records = write_shards(
        plan, corpus.ranges, workers=data.workers or len(os.sched_getaffinity(0)), on_shard=tokenizing.advance
    )
    tokenizing.tell()
    speed = round(tokenizing.megabytes_per_second, 2)
    splits: tuple[Split, ...] = ("train", "val")
    tokens = {split: sum(r.tokens for r in records if r.split == split) for split in splits}
    paths = [path for name in TOKENIZER_FILES if (path := directory / name).is_file()]
    files = [FileEntry(path=path.name, size_bytes=path.stat().st_size, sha256=hash_file(path)) for path in paths]
    files += [entry for record in records for entry in record.files]
    return DatasetManifest(
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        attempt=secrets.token_hex(8),
        versions={name: version(name) for name in ("tokenizers", "tiktoken", "datasets", "numpy")},
        name=data.name,
        dataset_id=found.dataset_id,
        inputs=found.hashed(),
        token_dtype="uint16" if plan.dtype.itemsize == 2 else "uint32",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        **{f"{split}_tokens": tokens[split] for split in splits},
        **{f"{split}_documents": corpus.documents(split) for split in splits},
        **{f"{split}_bytes": corpus.text_bytes(split) for split in splits},
        examples=examples,
        statistics={
            "empty_documents": corpus.empty_documents,
            "duplicate_documents": corpus.duplicate_documents,
            "tokens_per_byte": round(sum(tokens.values()) / sum(map(corpus.text_bytes, tokens)), 4),
            "engine": plan.engine,
            **({"split_note": corpus.split_note} if corpus.split_note else {}),
            **({"left_out": corpus.left_out} if corpus.left_out else {}),
            "megabytes_per_second": speed,
            **source_record(data.source, found.source.files),
        },
    )


def _check_both_splits(corpus: StagedCorpus, data: DataConfig) -> None:
    train, val = corpus.documents("train"), corpus.documents("val")
    left_out = f", and {note}" if (note := left_out_note(corpus.left_out)) else ""
    if train + val == 0:
        raise CorpusEmptyError(
            f"Source {data.source!r} of dataset {data.name!r} holds no text ({corpus.empty_documents} empty documents"
            f"{left_out}). Correct data.paths, data.text_field or data.max_documents."
        )
    if train == 0 or val == 0:
        raise CorpusTooSmallError(
            f"Dataset {data.name!r} has {train + val} documents and none of them falls into the "
            f"{'training' if train == 0 else 'validation'} part, with "
            f"data.validation_fraction {data.validation_fraction}, though few are cut to {DOCUMENT_BYTES:,} bytes"
            f"{left_out}. Give more text, or name held-out files in data.validation_paths."
        )


def _tokenizer(found: DatasetInputs, home: Path, corpus: StagedCorpus, on_progress: OnProgress) -> DocumentTokenizer:
    """The loaded tokenizer, or one trained on the training part; kept for a preparation that continues."""
    directory, settings, eos_token = home / "dataset", found.settings, found.eos_token
    if (directory / TOKENIZER_FILE).is_file():
        return load_tokenizer(str(directory), eos_token=eos_token, bos=found.data.bos)
    tokenizer, template = found.loaded, found.template
    if tokenizer is None:
        size = min(settings.training_bytes, corpus.text_bytes("train"))
        meter = Meter("train-tokenizer", size, on_progress)
        texts = _training_texts(home / "staged", corpus, size, meter.advance)
        tokenizer = train_tokenizer(
            texts, vocab_size=settings.vocab_size, eos_token=eos_token, mask_token=settings.mask_token
        )
        meter.tell()
    if template is not None:  # goes with the tokenizer into checkpoints and exports
        tokenizer = replace(tokenizer, others={**tokenizer.others, CHAT_TEMPLATE_FILE: template.text.encode()})
    tokenizer.save(directory)
    return tokenizer


def _training_texts(
    staged_directory: Path, corpus: StagedCorpus, limit_bytes: int, advance: Callable[[int], None]
) -> Iterator[str]:
    """Pieces of training text until there are `limit_bytes`; the one that reaches the limit is given whole."""
    given = 0
    for staged in corpus.ranges:
        for text, _ in read_pieces(staged_directory, staged) if staged.split == "train" else ():
            if given >= limit_bytes:
                return
            yield text
            size = len(text.encode())
            advance(min(size, limit_bytes - given))
            given += size


def begin_beside_parent() -> None:
    """Let a tokenizer be trained on all cores, and end with the process that started this one."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # this process never forks
    if os.environ.get(PARENT_PIPE_VARIABLE):
        threading.Thread(target=_leave_with_parent, daemon=True).start()


def _serve(request: PrepareRequest, emit: Emit) -> None:
    begin_beside_parent()
    options: dict[str, Any] = {
        "selection": request.selection,
        "on_progress": lambda progress: emit("tokenize_progress", **progress),
    }
    if request.stage_only:
        stage_dataset(request.data, request.tokenizer, request.work_directory, **options)
        return
    prepared = prepare_dataset(request.data, request.tokenizer, request.work_directory, **options)
    write_durably(request.result_path, prepared.model_dump_json().encode())


def _leave_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(TrainerInterruptedError.exit_code)  # nothing to save: every finished shard is kept


if __name__ == "__main__":
    serve_request(PrepareRequest, _serve)
