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
from typing import Any, TypeVar

from relora_train.checkpoints.layout import EXPORT_NAME, HEAD_NAME, parse_checkpoint_prefix, split_checkpoint_uri
from relora_train.checkpoints.lease import LeaseRecord
from relora_train.checkpoints.lineage import TOMBSTONE_NAME
from relora_train.checkpoints.manifest import MANIFEST_NAME, StoredRecord
from relora_train.checkpoints.series_record import SeriesRecord, is_pointer, protected_by
from relora_train.errors import CheckpointCorruptError, ObjectNotFoundError
from relora_train.storage.base import ObjectInfo, ObjectStore, parse_json

R = TypeVar("R", bound=StoredRecord)


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
        places = {info.key: parse_checkpoint_prefix(info.key.rpartition("/")[0]) for info in objects}
        done = {
            (place.run_id, place.short_fingerprint)
            for key, place in places.items()
            if place and key.endswith((f"/{MANIFEST_NAME}", f"/{TOMBSTONE_NAME}"))
        }
        found: dict[str, list[str]] = defaultdict(list)
        for info in objects:
            _, run_id, kind, *rest = info.key.split("/")
            is_manifest = rest[-1:] == [MANIFEST_NAME]
            if kind == "refs" and len(rest) == 1:
                record, stem = self._read(info), rest[0].removesuffix(".json")
                prefix = record.get("checkpoint")
                if record and not isinstance(prefix, str):
                    raise self._unreadable(info.key)
                why = f"the head of run {run_id}" if rest[0] == HEAD_NAME else f"pinned as {stem}"
                found[prefix or ""].append("exported" if stem.startswith(EXPORT_NAME) else why)
            elif kind == "lease.json" and (lease := self._parsed(info, LeaseRecord)):
                for uri in lease.depends_on:
                    found[split_checkpoint_uri(uri)[1]].append(f"run {run_id} started from it")
                if not lease.released and lease.purpose == "train":
                    before_merge = [
                        place.prefix
                        for each in objects
                        if (place := places[each.key]) and place.run_id == run_id
                        if each.key.endswith(f"/{MANIFEST_NAME}") and self._read(each).get("cycle") == 0
                    ]
                    for prefix in sorted(before_merge)[-1:]:
                        found[prefix].append(f"the flow of run {run_id} is under way and scores it at its end")
            elif kind == "checkpoints" and is_manifest:
                place = parse_checkpoint_prefix(self._parent(info))
                if place and place.run_id != run_id:
                    found[place.prefix].append(f"run {run_id} branches from it")
            elif kind == "snapshots" and is_manifest and (run_id, rest[0]) not in done:
                manifest = self._read(info)
                starts = {self._parent(info)}
                if manifest and "parent" not in manifest:  # it does not say: all that it could have started from
                    of_run = [place for place in places.values() if place and place.run_id == run_id]
                    step = manifest.get("step")
                    starts = {place.prefix for place in of_run if not (isinstance(step, int) and place.step > step)}
                for prefix in sorted(starts - {""}):
                    found[prefix].append(f"a snapshot of run {run_id} started from it")
        for info in self._store.list("series/"):
            if is_pointer(info.key) and (series := self._parsed(info, SeriesRecord)):
                for prefix, reason in protected_by(series).items():
                    found[prefix].append(reason)
        return {prefix: tuple(dict.fromkeys(reasons)) for prefix, reasons in found.items()}

    def _parsed(self, info: ObjectInfo, kind: type[R]) -> R | None:
        record = self._read(info)
        try:
            return kind.model_validate(record) if record else None
        except ValueError:
            raise self._unreadable(info.key) from None

    def _parent(self, info: ObjectInfo) -> str:
        """Return the prefix of the parent that a manifest names, whatever its store is called by now; '' for none."""
        parent = self._read(info).get("parent")
        try:
            return split_checkpoint_uri(parent["uri"])[1] if parent else ""
        except (KeyError, TypeError):
            raise self._unreadable(info.key) from None

    def _read(self, info: ObjectInfo) -> Any:
        """Return the object's JSON, or an empty one if it is gone since it was listed."""
        known = self._known.get((info.key, info.etag))
        if known is not None:
            return known
        try:
            data, etag = self._store.get_bytes(info.key)
            value = parse_json(data)
        except ObjectNotFoundError:
            return {}
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._unreadable(info.key)
        self._known[info.key, etag] = value
        return value

    def _unreadable(self, key: str) -> CheckpointCorruptError:
        return CheckpointCorruptError(
            f"{self._store.uri}/{key} cannot be read, and it may be what protects a checkpoint: nothing is removed. "
            "Repair or delete it, then prune again."
        )
