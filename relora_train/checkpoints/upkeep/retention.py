"""Decide which checkpoints of a run may go. pruning.py has the effects.

A checkpoint goes only if nothing says that it stays. These stay whatever the policy: the end of every line, and what
something outside the line depends on. Every checkpoint is complete without its ancestors, so removing one never damages
a descendant. Protections finds what depends on a checkpoint, across all runs of a store:

- refs/<name>.json: the head, pins (`relora pin`) and recorded exports
- lease.json: the checkpoint that the latest flow of a run started from, until another flow of that run begins. A
  crashed flow's start is as precious as a live one's, so no clock is asked
- a lease not released: also the run's last checkpoint before any merge, which its flow scores at its end
- a committed checkpoint: its parent in another run
- a snapshot of a stage that is not committed: the checkpoint it started from
- series/<name>/promoted.json: its champion, and those that it can go back to (series_record.py)
Not seen: runs in other stores that branch from here. Pin the checkpoints that they start from.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from relora_train.checkpoints.layout import (
    EXPORT_NAME,
    HEAD_NAME,
    join_key,
    parse_checkpoint_prefix,
    split_checkpoint_uri,
)
from relora_train.checkpoints.lease import LeaseRecord
from relora_train.checkpoints.lineage import TOMBSTONE_NAME, CheckpointRef, line_to
from relora_train.checkpoints.manifest import MANIFEST_NAME, StoredRecord
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.series_record import SeriesRecord, is_pointer, protected_by
from relora_train.errors import CheckpointCorruptError, ConfigError, ObjectNotFoundError
from relora_train.settings.profile import profile_to_read
from relora_train.storage.base import ObjectInfo, ObjectStore, parse_json

R = TypeVar("R", bound=StoredRecord)


@dataclass(frozen=True)
class RetentionPolicy:
    """keep_last: of every line the last so many; keep_every: also every so many-th cycle, the warm start included."""

    keep_last: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.keep_last, self.keep_every) if value is not None]
        if not given or min(given) < 1:
            raise ConfigError(
                f"keep_last {self.keep_last} and keep_every {self.keep_every} make no retention policy: give at least "
                "one of them, of at least 1, by --keep-last and --keep-every or in the profile's [retention]."
            )


@dataclass(frozen=True)
class Verdict:
    """A checkpoint and why it stays; no reason: it goes."""

    checkpoint: CheckpointRef
    reasons: tuple[str, ...]

    @property
    def keep(self) -> bool:
        return bool(self.reasons)


def plan_pruning(
    history: Sequence[CheckpointRef], policy: RetentionPolicy, protected: Mapping[str, Sequence[str]]
) -> Sequence[Verdict]:
    """Return a verdict on every checkpoint that is there, in the order of `history`. Planning again changes nothing.

    history: CheckpointStore.history(), removed ones included, since they hold the lines together.
    protected: checkpoint prefix -> why others need it.
    """
    present = [ref for ref in history if not ref.is_pruned]
    lines = {ref.prefix: [known for known in line_to(ref, history) if not known.is_pruned] for ref in present}
    inner = {ancestor.prefix for line in lines.values() for ancestor in line[:-1]}
    ends = [ref for ref in present if ref.prefix not in inner]
    last = {ref.prefix for end in ends for ref in lines[end.prefix][-(policy.keep_last or 1) :]}
    verdicts = []
    for ref in present:
        reasons = list(protected.get(ref.prefix, ()))
        if ref in ends:
            reasons.append("the end of a line")
        elif ref.prefix in last:
            reasons.append(f"one of the last {policy.keep_last} of its line")
        if policy.keep_every is not None and stage_number(ref.manifest.stage) % policy.keep_every == 0:
            reasons.append(f"every {policy.keep_every} cycles")
        verdicts.append(Verdict(ref, tuple(reasons)))
    return verdicts


def stage_number(stage: str) -> int:
    """Return 3 for 'cycle-3' and 'full-3', 0 for 'warm-start', 1 for 'lora'."""
    number = re.search(r"-(\d+)$", stage)
    return int(number[1]) if number else int(stage == "lora")


def policy_of_run(store: ObjectStore, run_id: str) -> RetentionPolicy | None:
    """Return the policy of the newest checkpoint's profile; None if the run has no checkpoint or no policy."""
    refs = CheckpointStore(store, run_id).list()
    if not refs:
        return None
    newest = max(refs, key=lambda ref: ref.manifest.created_at)
    place = join_key(newest.prefix, newest.manifest.files_prefix, "profile.json")
    try:
        retention = profile_to_read(store.get_bytes(place)[0]).retention
    except ValidationError as error:
        raise CheckpointCorruptError(
            f"{store.uri}/{place} is no valid profile: {error.errors()[0]['msg']}. Give --keep-last or --keep-every."
        ) from None
    if retention.keep_last is None and retention.keep_every is None:
        return None
    return RetentionPolicy(retention.keep_last, retention.keep_every)


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
