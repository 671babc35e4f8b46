"""The metrics of a run: those that its checkpoints hold, and of a running stage those that its flow has told of."""

import json
from collections.abc import Iterator
from typing import Any

from relora_train.checkpoints.fetch import FetchFiles, files_in_stores
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.status import RunStatus
from relora_train.errors import CheckpointAmbiguousError, CheckpointCorruptError
from relora_train.runs.run import line_of
from relora_train.storage.base import ObjectStore
from relora_train.storage.workspace import checkpoint_cache


def checkpoint_metrics(checkpoint: CheckpointRef, fetch_files: FetchFiles) -> Iterator[dict[str, Any]]:
    """Yield the records of a checkpoint's metrics.jsonl; none if it has no such file."""
    if not any(entry.path == "metrics.jsonl" for entry in checkpoint.manifest.files):
        return
    lines = (fetch_files(checkpoint, ["metrics.jsonl"]) / "metrics.jsonl").read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        try:
            record = json.loads(text or b"null")
        except ValueError as error:
            raise CheckpointCorruptError(
                f"Line {number} of metrics.jsonl of {checkpoint.uri} is not JSON: {error}. Use another checkpoint."
            ) from None
        if isinstance(record, dict):
            yield record


def stored_metrics(store: ObjectStore, run_id: str) -> list[dict[str, Any]]:
    """Return the records of the run's line, in order, each with its run and stage.

    A run without one line that is known to be meant is read along the line to its newest checkpoint.
    """
    run = CheckpointStore(store, run_id)
    try:
        latest = run.latest()
    except CheckpointAmbiguousError:
        latest = max(run.list(), key=lambda ref: ref.manifest.created_at, default=None)
    fetch = files_in_stores(checkpoint_cache(run_id))
    return [
        {"run_id": ref.manifest.run_id, "stage": ref.manifest.stage, **record}
        for ref in line_of(latest)
        for record in checkpoint_metrics(ref, fetch)
    ]


def with_running(stored: list[dict[str, Any]], run_id: str, status: RunStatus | None) -> list[dict[str, Any]]:
    """Return the stored records of a run, and what its status tells of stages that are not stored yet."""
    stages = {one["stage"] for one in stored if one["run_id"] == run_id}
    return stored + [
        {"run_id": run_id, **one} for one in (status.records if status else ()) if one["stage"] not in stages
    ]
