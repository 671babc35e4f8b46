"""Find the checkpoints of a store that something depends on, across all its runs.

- refs/<name>.json: the head, pins (`relora pin`) and recorded exports
- lease.json: the checkpoint that the latest flow of a run started from, until another flow of that run begins. A
  crashed flow's start is as precious as a live one's, so no clock is asked
- a lease not released: also the run's last checkpoint before any merge, which its flow scores at its end
- a committed checkpoint: its parent in another run
- a snapshot of a stage that is not committed: the checkpoint it started from
- series/<name>/promoted.json: its champion, and those that it can go back to (series_record.py)
Not seen: runs in other stores that branch from here. Pin the checkpoints that they start from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from relora_train.checkpoints.layout import EXPORT_NAME, HEAD_NAME, parse_checkpoint_prefix, split_checkpoint_uri
from relora_train.checkpoints.lease import LeaseRecord
from relora_train.checkpoints.lineage import TOMBSTONE_NAME
from relora_train.checkpoints.manifest import MANIFEST_NAME
from relora_train.checkpoints.series_record import SeriesRecord, is_pointer, protected_by
from relora_train.errors import CheckpointCorruptError, ObjectNotFoundError
from relora_train.storage.base import ObjectInfo, ObjectStore, parse_json


class Protections:
    """Reads a store's protections, each object once as long as it does not change."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._known: dict[tuple[str, str], Any] = {}

    def find(self) -> Mapping[str, Sequence[str]]:
        """Return checkpoint prefix -> reasons to stay, as of now. Unreadable objects raise: they may protect anything.

        Objects are known by key and etag: manifests never change, refs and leases change their etag.
        """
        objects = [info for info in self._store.list("runs/") if info.key.count("/") >= 2]
        done = {
            (place.run_id, place.short_fingerprint)
            for info in objects
            for directory, _, name in [info.key.rpartition("/")]
            if name in (MANIFEST_NAME, TOMBSTONE_NAME) and (place := parse_checkpoint_prefix(directory))
        }
        found: dict[str, list[str]] = defaultdict(list)
        for info in objects:
            _, run_id, kind, *rest = info.key.split("/")
            if kind == "refs" and len(rest) == 1:
                found[self._checkpoint_of_ref(info)].append(_ref_reason(run_id, rest[0]))
            elif kind == "lease.json":
                self._add_lease(found, info, run_id, objects)
            elif rest and rest[-1] == MANIFEST_NAME and kind in ("checkpoints", "snapshots"):
                if kind == "snapshots":
                    if (run_id, rest[0]) not in done:
                        for prefix in self._possible_parents(info, run_id, objects):
                            found[prefix].append(f"a snapshot of run {run_id} started from it")
                    continue
                parent = self._parent(info)
                place = parse_checkpoint_prefix(parent or "")
                if parent is None or place is None:
                    continue
                if kind == "checkpoints" and place.run_id != run_id:
                    found[parent].append(f"run {run_id} branches from it")
        self._add_series(found)
        return {prefix: tuple(dict.fromkeys(reasons)) for prefix, reasons in found.items()}

    def _add_series(self, found: dict[str, list[str]]) -> None:
        for info in self._store.list("series/"):
            if not is_pointer(info.key) or not (record := self._read(info)):
                continue
            try:
                series = SeriesRecord.model_validate(record)
            except ValueError:
                raise _unreadable(self._store, info.key) from None
            for prefix, reason in protected_by(series).items():
                found[prefix].append(reason)

    def _add_lease(
        self, found: dict[str, list[str]], info: ObjectInfo, run_id: str, objects: Sequence[ObjectInfo]
    ) -> None:
        record = self._read(info)
        if not record:
            return
        try:
            lease = LeaseRecord.model_validate(record)
        except ValueError:
            raise _unreadable(self._store, info.key) from None
        for uri in lease.depends_on:
            found[split_checkpoint_uri(uri)[1]].append(f"run {run_id} started from it")
        if lease.released or lease.purpose != "train":
            return
        before_merge = [
            directory
            for directory, _, name in (each.key.rpartition("/") for each in objects)
            if name == MANIFEST_NAME
            and directory.startswith(f"runs/{run_id}/checkpoints/")
            and self._read_key(f"{directory}/{name}", objects).get("cycle") == 0
        ]
        for prefix in sorted(before_merge)[-1:]:
            found[prefix].append(f"the flow of run {run_id} is under way and scores it at its end")

    def _possible_parents(self, info: ObjectInfo, run_id: str, objects: Sequence[ObjectInfo]) -> Sequence[str]:
        """Return the start of a snapshot's stage; if its manifest does not name it, all that it could be."""
        manifest = self._read(info)
        if "parent" in manifest or not manifest:
            parent = self._parent(info)
            return [parent] if parent else []
        places = (parse_checkpoint_prefix(each.key.rpartition("/")[0]) for each in objects)
        step = manifest.get("step")
        return sorted(
            {
                place.prefix
                for place in places
                if place and place.run_id == run_id and not (isinstance(step, int) and place.step > step)
            }
        )

    def _read_key(self, key: str, objects: Sequence[ObjectInfo]) -> Any:
        return next((self._read(info) for info in objects if info.key == key), {})

    def _parent(self, info: ObjectInfo) -> str | None:
        """Return the prefix of the parent that a manifest names, whatever its store is called by now."""
        parent = self._read(info).get("parent")
        try:
            return split_checkpoint_uri(parent["uri"])[1] if parent else None
        except (KeyError, TypeError):
            raise _unreadable(self._store, info.key) from None

    def _checkpoint_of_ref(self, info: ObjectInfo) -> str:
        prefix = self._read(info).get("checkpoint")
        if not isinstance(prefix, str) and self._read(info):
            raise _unreadable(self._store, info.key)
        return str(prefix or "")

    def _read(self, info: ObjectInfo) -> Any:
        """Return the object's JSON, or an empty one if it is gone since it was listed."""
        known = self._known.get((info.key, info.etag))
        if known is not None:
            return known
        try:
            data, etag = self._store.get_bytes(info.key)
        except ObjectNotFoundError:
            return {}
        try:
            value = parse_json(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise _unreadable(self._store, info.key)
        self._known[info.key, etag] = value
        return value


def _ref_reason(run_id: str, name: str) -> str:
    if name == HEAD_NAME:
        return f"the head of run {run_id}"
    stem = name.removesuffix(".json")
    return "exported" if stem.startswith(EXPORT_NAME) else f"pinned as {stem}"


def _unreadable(store: ObjectStore, key: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{store.uri}/{key} cannot be read, and it may be what protects a checkpoint: nothing is removed. "
        "Repair or delete it, then prune again."
    )
