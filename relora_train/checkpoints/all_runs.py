"""The contents of a store across all its runs: for people, and for lineage."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from relora_train.checkpoints.layout import CheckpointPlace, parse_checkpoint_prefix
from relora_train.checkpoints.lineage import CheckpointRef, read_checkpoint
from relora_train.checkpoints.manifest import MANIFEST_NAME
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import CheckpointError
from relora_train.storage.base import ObjectStore

_log = logging.getLogger("relora_train.checkpoints.all_runs")


@dataclass(frozen=True)
class RunInfo:
    """One run in a store."""

    run_id: str
    checkpoint_count: int
    latest_step: int
    profile: str | None
    """The latest checkpoint's; None when its manifest is damaged."""
    modified_at: datetime
    """The time of the newest commit, by the store's clock."""


def list_runs(store: ObjectStore) -> Sequence[RunInfo]:
    """Return every run with at least one committed checkpoint, by run id."""
    by_run: dict[str, list[tuple[CheckpointPlace, datetime]]] = {}
    for place, modified_at in _committed(store):
        by_run.setdefault(place.run_id, []).append((place, modified_at))
    runs = []
    for run_id, found in sorted(by_run.items()):
        latest = max((place for place, _ in found), key=lambda place: place.step)
        ref = _read_or_warn(store, latest.prefix)
        profile = ref.manifest.profile if ref else None
        runs.append(RunInfo(run_id, len(found), latest.step, profile, max(moment for _, moment in found)))
    return runs


def read_checkpoints(store: ObjectStore) -> list[CheckpointRef]:
    """Return every committed checkpoint of every run. A damaged manifest is left out with a warning."""
    refs = [_read_or_warn(store, place.prefix) for place, _ in _committed(store)]
    return [ref for ref in refs if ref is not None]


def read_heads(store: ObjectStore, refs: Iterable[CheckpointRef]) -> set[str]:
    """Return the URIs of the heads of the runs that `refs` belong to; a run whose head is lost has none."""
    heads = set()
    for run_id in {ref.manifest.run_id for ref in refs if ref.store_uri == store.uri}:
        try:
            head = CheckpointStore(store, run_id).head(missing_ok=True)
        except CheckpointError as error:
            _log.warning("%s", error)
            continue
        heads |= {head.uri} if head else set()
    return heads


def _committed(store: ObjectStore) -> Iterable[tuple[CheckpointPlace, datetime]]:
    for info in store.list("runs/"):
        prefix, _, name = info.key.rpartition("/")
        if name == MANIFEST_NAME and (place := parse_checkpoint_prefix(prefix)):
            yield place, info.modified_at


def _read_or_warn(store: ObjectStore, prefix: str) -> CheckpointRef | None:
    try:
        return read_checkpoint(store, prefix)
    except CheckpointError as error:
        _log.warning("%s", error)  # lists and trees are where an operator sees the damage, so they must still come
        return None
