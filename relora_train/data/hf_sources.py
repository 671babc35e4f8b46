"""Rows through the `datasets` library, streamed: parquet files and hub datasets. Light until the first call."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from relora_train.data.fields import field_path, missing_field
from relora_train.data.left_out import Fault, text_or_fault
from relora_train.data.records import Document, RecordReader
from relora_train.data.source_files import SourceFile
from relora_train.errors import SourceUnreadableError
from relora_train.settings.data import DataConfig

if TYPE_CHECKING:
    import pyarrow
    from datasets import IterableDataset

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROWS_AT_ONCE = 256


def parquet_rows(
    file: SourceFile, records: RecordReader, advance: Callable[[int], None]
) -> Iterator[tuple[str, Document | Fault]]:
    """Yield each row's document with its place, reading only its columns. Raises Fault if the file is no parquet."""
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file.path) as opened:
            fields = _names(opened.schema_arrow)
            rows = max(1, opened.metadata.num_rows)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        if _is_of_this_machine(error):
            raise SourceUnreadableError(f"{file.name} cannot be read: {error}. Let this user read it.") from None
        fault = f"{file.name} is no parquet file: {error}. Leave it out of data.paths."
        raise Fault(fault, "no parquet file", "files") from None
    for name, setting in records.fields.items():
        if missing := missing_field(fields, name, file.name, setting):
            raise Fault(missing, f"no field {name!r}", "files")
    paths = [field_path(fields, name) for name in records.fields]
    options = {"data_files": [str(file.path)], "columns": _columns(paths)}
    stream = _load("parquet", file.name, split="train", streaming=True, **options)
    for number, (where, text) in enumerate(
        _documents(stream, file.name, paths, records, damaged=lambda said: Fault(said, "damaged", "files")), start=1
    ):
        advance(file.size_bytes * number // rows - file.size_bytes * (number - 1) // rows)
        yield where, text


def hub_rows(
    data: DataConfig, records: RecordReader, revision: str, advance: Callable[[int], None]
) -> Iterator[tuple[str, Document | Fault]]:
    """Yield each row's document of one revision of a hub dataset, streamed: only the rows at hand are kept."""
    name = f"{data.hub_id}@{revision[:12]}"
    stream = _load(data.hub_id, name, data.hub_config, split=data.hub_split, revision=revision, streaming=True)
    fields: dict[str, Any] = dict(stream.features or {})
    if not fields:
        with _hub_errors(name):
            fields = dict(next(iter(stream), {}))
    for field_name, setting in records.fields.items():
        if fields and (missing := missing_field(fields, field_name, name, setting)):
            raise SourceUnreadableError(missing)
    paths = [field_path(fields, field_name) for field_name in records.fields]
    stream = stream.select_columns(_columns(paths))
    for where, text in _documents(stream, name, paths, records, damaged=SourceUnreadableError):
        advance(len(text) if isinstance(text, str) else 0)
        yield where, text


def resolve_hub_revision(data: DataConfig) -> str:
    """Return the commit that `hub_revision` (or the newest) means now. A full commit id needs no network."""
    if data.hub_revision and _COMMIT.fullmatch(data.hub_revision):
        return data.hub_revision
    _set_environment()
    from huggingface_hub import HfApi

    with _hub_errors(str(data.hub_id)):
        found = HfApi().dataset_info(str(data.hub_id), revision=data.hub_revision, timeout=30).sha
    if not found:
        raise SourceUnreadableError(f"The hub names no commit for dataset {data.hub_id!r}. Set data.hub_revision.")
    return str(found)


def _load(path: str | None, name: str, *args: Any, **kwargs: Any) -> IterableDataset:
    _set_environment()
    import datasets

    with _hub_errors(name):
        return datasets.load_dataset(path, *args, **kwargs)


def _columns(paths: Sequence[Sequence[str]]) -> list[str]:
    """Return the outermost fields that hold all others, each once."""
    return list(dict.fromkeys(path[0] for path in paths))


def _documents(
    stream: IterableDataset,
    name: str,
    paths: Sequence[Sequence[str]],
    records: RecordReader,
    *,
    damaged: Callable[[str], Exception],
) -> Iterator[tuple[str, Document | Fault]]:
    import pyarrow.compute as compute

    row, path, are_texts = 0, paths[0], records.are_texts
    batches = iter(stream.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE))
    while True:
        try:
            table = next(batches, None)
            values: list[Any] = []
            if table is not None and are_texts:  # a column costs less than rows of one field
                column = table.column(path[0])
                if path[1:]:
                    column = compute.struct_field(column, list(path[1:]))  # null where what holds it is null
                values = column.to_pylist()
            elif table is not None:
                values = table.to_pylist()
        except Exception as error:  # as above; a decoding fault surfaces here
            kind = SourceUnreadableError if _is_of_this_machine(error) else damaged
            raise kind(
                f"{name} cannot be read after row {row}: {type(error).__name__}: {error}. Repair or fetch it again."
            ) from error
        if table is None:
            return
        for value in values:
            row += 1
            where = f"{name}, row {row}"
            yield where, text_or_fault(value, ".".join(path), where) if are_texts else records.read(value, where)


def _is_of_this_machine(error: Exception) -> bool:
    """Return True for a fault that another attempt may not have; pyarrow gives damaged content no error number."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def _names(fields: pyarrow.Schema | pyarrow.StructType) -> dict[str, Any]:
    """Return the names of fields, with those inside structures; '' stands for any other type."""
    import pyarrow.types

    return {field.name: _names(field.type) if pyarrow.types.is_struct(field.type) else "" for field in fields}


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # hub, http, sockets, and builders that raise whatever their parser raises
        why = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"
        raise SourceUnreadableError(
            f"{name} cannot be read: {why}. Without a network, or where HF_HUB_OFFLINE is set, a hub dataset cannot be "
            "read: download its files elsewhere and use source 'parquet' or 'jsonl' with data.paths. A private one "
            "needs HF_TOKEN in the environment."
        ) from error


def _set_environment() -> None:
    """Switch off telemetry, download counts and torch. The libraries read this when they are imported."""
    off = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "USE_TORCH": "0"}
    for name, value in off.items():
        os.environ.setdefault(name, value)
