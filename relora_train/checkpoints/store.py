"""Merge checkpoints in a store: commit, find, list, fetch, verify, and which line of them is the run's. Light.

What is listed is exactly what can be read: a prefix without manifest.json is absent. Every answer is read from the
store at the time of the call; nothing is cached. Names in a store: relora_train/checkpoints/layout.py. Choosing a
checkpoint by name ("RUN@cycle-2"): relora_train/checkpoints/names.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from relora_train.checkpoints.bundle import commit_bundle, fetch_bundle, keep_fetched, read_manifest, verify_bundle
from relora_train.checkpoints.layout import (
    CheckpointPlace,
    check_run_id,
    checkpoint_prefix,
    checkpoints_prefix,
    dataset_prefix,
    head_key,
    parse_checkpoint_prefix,
)
from relora_train.checkpoints.manifest import MANIFEST_NAME, CheckpointManifest, DatasetManifest
from relora_train.checkpoints.tombstone import TOMBSTONE_NAME, read_tombstone, removed_message
from relora_train.errors import (
    CheckpointAmbiguousError,
    CheckpointCorruptError,
    CheckpointNotFoundError,
    ConfigError,
    PreconditionFailedError,
)
from relora_train.storage.base import ObjectStore, find_bytes, parse_json
from relora_train.storage.opening import open_store

_log = logging.getLogger("relora_train.checkpoints.store")
_HEAD_ATTEMPTS = 5


@dataclass(frozen=True)
class CheckpointRef:
    """One committed checkpoint, found in some store."""

    uri: str
    """Names it everywhere: store URI and prefix."""
    store_uri: str
    prefix: str
    manifest: CheckpointManifest
    is_removed: bool = False
    """Known from its tombstone only: it has a place in the lineage and no files."""

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def stands_for(self) -> str:
        """Fingerprint of the stage whose result this is: its own, or that of the stage it was made in place of."""
        return self.manifest.variant_of or self.fingerprint


@dataclass(frozen=True)
class RunInfo:
    """What a store holds of one run."""

    run_id: str
    checkpoint_count: int
    latest_step: int
    profile: str | None
    """Of the latest checkpoint; None when its manifest is damaged."""
    modified_at: datetime
    """When the newest checkpoint was committed, by the store's clock."""


class CheckpointStore:
    """The checkpoints of one run in one store."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self.store = store
        self.run_id = check_run_id(run_id)

    def commit(
        self, directory: Path, manifest: CheckpointManifest, *, permit: Callable[[], None] | None = None
    ) -> CheckpointRef:
        """Make a directory the committed checkpoint of its fingerprint, or adopt the one that another attempt made.

        All or nothing, first one wins, safe to repeat, permit: see bundle.py. Does not move the head.
        """
        if manifest.run_id != self.run_id:
            raise ConfigError(f"A checkpoint of run {manifest.run_id!r} cannot be committed to run {self.run_id!r}.")
        ref = self.place_of(manifest)
        return replace(ref, manifest=commit_bundle(self.store, ref.prefix, directory, manifest, permit=permit))

    def place_of(self, manifest: CheckpointManifest) -> CheckpointRef:
        """The checkpoint as it will be once it is committed. Whether it is, is not looked up."""
        return make_ref(self.store, checkpoint_prefix(self.run_id, manifest.step, manifest.fingerprint), manifest)

    def find(self, fingerprint: str) -> CheckpointRef | None:
        """The committed checkpoint of exactly this work, or None."""
        for place, _ in self._places():
            if place.short_fingerprint == fingerprint[:12]:
                ref = self._read(place)
                if ref is not None and ref.fingerprint == fingerprint:
                    return ref
        return None

    def list(self) -> Sequence[CheckpointRef]:
        """All committed checkpoints by step. A damaged manifest is an error here: skipping it would be guessing."""
        refs, faults = self.survey()
        if faults:
            raise faults[0]
        return refs

    def survey(self) -> tuple[Sequence[CheckpointRef], Sequence[CheckpointCorruptError]]:
        """The committed checkpoints that can be read, by step, and what is wrong with the others: for people."""
        refs, faults = [], []
        for place, _ in self._places():
            try:
                ref = self._read(place)
            except CheckpointCorruptError as error:
                faults.append(error)
            else:
                refs += [ref] if ref is not None else []
        return sorted(refs, key=lambda ref: (ref.step, ref.fingerprint)), faults

    def history(self) -> Sequence[CheckpointRef]:
        """All checkpoints by step, with those that retention removed: the lineage without gaps."""
        kept = self.list()
        places = {ref.prefix for ref in kept}
        removed = (ref for ref in self._removed() if ref.prefix not in places)
        return sorted([*kept, *removed], key=lambda ref: (ref.step, ref.fingerprint))

    def find_removed(self, fingerprint: str) -> CheckpointRef | None:
        """The checkpoint of exactly this work that retention removed after others had been trained from it, or None.

        Raises CheckpointNotFoundError when nothing that came from it is left either.
        """
        history = self.history()
        for ref in history:
            if ref.is_removed and ref.fingerprint == fingerprint:
                if any(ref in line_to(other, history) for other in history if not other.is_removed):
                    return ref
                tombstone = read_tombstone(self.store, ref.prefix)
                if tombstone is not None:
                    raise CheckpointNotFoundError(removed_message(ref.uri, tombstone))
        return None

    def fetch(self, ref: CheckpointRef, cache_dir: Path) -> Path:
        """As fetch_checkpoint; for a checkpoint of this store without opening it anew."""
        return fetch_checkpoint(ref, cache_dir, store=self._store_of(ref))

    def keep(self, ref: CheckpointRef, made: CheckpointManifest, directory: Path, cache_dir: Path) -> None:
        """Let `fetch` find what was committed as `ref` from `directory`, which is moved: see keep_fetched."""
        keep_fetched(self.store, made, ref.manifest, directory, _fetched_directory(ref, cache_dir))

    def verify(self, ref: CheckpointRef) -> None:
        """Read every byte; raises CheckpointCorruptError or CheckpointIncompleteError naming the first bad file."""
        verify_bundle(self._store_of(ref), ref.prefix, ref.manifest)

    def head(self, *, missing_ok: bool = False) -> CheckpointRef | None:
        """The checkpoint that refs/head.json names; None when the run has no head yet.

        One that was deleted is an error, or with missing_ok None.
        """
        return self._read_head(missing_ok=missing_ok)[0]

    def set_head(self, ref: CheckpointRef) -> CheckpointRef:
        """Make a checkpoint the head and return the head there is now. Never loses another writer's move.

        A head that already descends from `ref` stays: repeating old work does not send a run back. A sideways move
        (a branch becomes the run's line) is made, and a head whose checkpoint was deleted is replaced. If another
        writer moves the head sideways at the same moment, PreconditionFailedError.
        """
        place = parse_checkpoint_prefix(ref.prefix)
        if ref.store_uri != self.store.uri or place is None or place.run_id != self.run_id:
            raise ConfigError(f"{ref.uri} cannot be the head of run {self.run_id!r} in {self.store.uri}: not its own.")
        first_seen: CheckpointRef | None = None
        for attempt in range(_HEAD_ATTEMPTS):
            head, etag = self._read_head(missing_ok=True)
            if head is not None and ref in self.ancestry(head):
                return head
            if attempt == 0:
                first_seen = head
            elif head != first_seen and (head is None or head not in self.ancestry(ref)):
                raise PreconditionFailedError(
                    f"Another writer moved the head of run {self.run_id!r} to {head.uri if head else 'nothing'} "
                    f"while it was being moved to {ref.uri}. Stop one of the two flows, then run the other again."
                )
            try:
                self.store.put_bytes(head_key(self.run_id), _head_record(ref), if_absent=etag is None, if_match=etag)
                return ref
            except PreconditionFailedError:
                continue
        raise PreconditionFailedError(
            f"The head of run {self.run_id!r} changed {_HEAD_ATTEMPTS} times while it was being moved to {ref.uri}. "
            "Stop the other flows of this run, then run again."
        )

    def latest(self) -> CheckpointRef | None:
        """The end of the run's line: the head, then on along single children (a lost head update costs nothing).

        Without a head, the end of the only line there is. None for an empty run. Two candidates are a
        CheckpointAmbiguousError that names them; never the highest number in a listing.
        """
        refs, head = self.history(), self.head()
        return end_of_line(without_removed_ends(refs), head, run_id=self.run_id)

    def ancestry(self, ref: CheckpointRef) -> Sequence[CheckpointRef]:
        """The checkpoints of this run that led to `ref` and are still there, oldest first, itself last."""
        return [known for known in line_to(ref, self.history()) if not known.is_removed]

    def _places(self) -> Iterator[tuple[CheckpointPlace, datetime]]:
        return _committed_places(self.store, checkpoints_prefix(self.run_id))

    def _removed(self) -> Iterator[CheckpointRef]:
        for info in self.store.list(checkpoints_prefix(self.run_id)):
            directory, _, name = info.key.rpartition("/")
            if name == TOMBSTONE_NAME and parse_checkpoint_prefix(directory):
                tombstone = read_tombstone(self.store, directory)
                if tombstone is not None:
                    yield replace(make_ref(self.store, directory, tombstone.manifest), is_removed=True)

    def _read(self, place: CheckpointPlace) -> CheckpointRef | None:
        return read_checkpoint(self.store, place.prefix)

    def _read_head(self, *, missing_ok: bool = False) -> tuple[CheckpointRef | None, str | None]:
        key = head_key(self.run_id)
        found = find_bytes(self.store, key)
        if found is None:
            return None, None
        data, etag = found
        try:
            place = parse_checkpoint_prefix(parse_json(data)["checkpoint"])
        except (ValueError, KeyError, TypeError):
            place = None
        if place is None or place.run_id != self.run_id:
            raise CheckpointCorruptError(
                f"{self.store.uri}/{key} is damaged: it names no checkpoint of run {self.run_id!r}. "
                "Delete it and name the checkpoint to go on from."
            )
        ref = self._read(place)
        if ref is None and not missing_ok:
            raise CheckpointNotFoundError(
                f"{self.store.uri}/{key} names {place.prefix}, which is not committed: it was deleted. "
                f"Restore it, or delete {key} and name the checkpoint to go on from."
            )
        return ref, etag

    def _store_of(self, ref: CheckpointRef) -> ObjectStore:
        return self.store if ref.store_uri == self.store.uri else open_store(ref.store_uri)


def line_to(ref: CheckpointRef, refs: Sequence[CheckpointRef]) -> Sequence[CheckpointRef]:
    """`ref` and those of `refs` that led to it, oldest first. Pure. Ends where a parent lies in another run."""
    by_fingerprint = {known.fingerprint: known for known in refs}
    line, seen = [ref], {ref.fingerprint}
    while (parent := line[0].manifest.parent) and parent.fingerprint in by_fingerprint.keys() - seen:
        line.insert(0, by_fingerprint[parent.fingerprint])
        seen.add(parent.fingerprint)
    return line


def without_removed_ends(refs: Sequence[CheckpointRef]) -> Sequence[CheckpointRef]:
    """Checkpoints, and of the removed ones only those that something still there came from. Pure."""
    needed = {known.prefix for ref in refs if not ref.is_removed for known in line_to(ref, refs)}
    return [ref for ref in refs if ref.prefix in needed]


def end_of_line(refs: Sequence[CheckpointRef], head: CheckpointRef | None, *, run_id: str) -> CheckpointRef | None:
    """Where a run stands; see CheckpointStore.latest. Pure."""

    def children(parent: CheckpointRef) -> Sequence[CheckpointRef]:
        return [ref for ref in refs if ref.manifest.parent and ref.manifest.parent.fingerprint == parent.fingerprint]

    if head is None:
        ends = [ref for ref in refs if not children(ref)]
        if not ends:
            return None
        return _the_only(ends, f"Run {run_id!r} has no head and")
    while following := children(head):
        head = _the_only(following, f"Run {run_id!r} stands at {head.uri}, after which")
    return head


def read_checkpoint(store: ObjectStore, prefix: str) -> CheckpointRef | None:
    """The checkpoint committed at a prefix, or None. One whose manifest belongs elsewhere is refused."""
    manifest = read_manifest(store, prefix, CheckpointManifest)
    if manifest is None:
        return None
    ref = make_ref(store, prefix, manifest)
    if prefix and prefix != checkpoint_prefix(manifest.run_id, manifest.step, manifest.fingerprint):
        raise CheckpointCorruptError(
            f"{ref.uri} holds the manifest of run {manifest.run_id!r}, step {manifest.step}, fingerprint "
            f"{manifest.fingerprint[:12]}: it was copied or renamed. Move it back or delete it."
        )
    return ref


def make_ref(store: ObjectStore, prefix: str, manifest: CheckpointManifest) -> CheckpointRef:
    return CheckpointRef(f"{store.uri}/{prefix}".rstrip("/"), store.uri, prefix, manifest)


def fetch_checkpoint(ref: CheckpointRef, cache_dir: Path, *, store: ObjectStore | None = None) -> Path:
    """A local directory with the checkpoint's verified files: the store's own if it is local, else below `cache_dir`.

    The directory's name holds a digest of the manifest, so that two checkpoints never share one.
    """
    return fetch_bundle(
        store or open_store(ref.store_uri), ref.prefix, ref.manifest, _fetched_directory(ref, cache_dir)
    )


def _fetched_directory(ref: CheckpointRef, cache_dir: Path) -> Path:
    digest = hashlib.sha256(ref.manifest.to_bytes()).hexdigest()[:12]
    return cache_dir / f"step-{ref.step:08d}-{ref.fingerprint[:12]}-{digest}"


def list_runs(store: ObjectStore) -> Sequence[RunInfo]:
    """Every run with at least one committed checkpoint, by run id."""
    places: dict[str, list[tuple[CheckpointPlace, datetime]]] = {}
    for place, modified_at in _committed_places(store, "runs/"):
        places.setdefault(place.run_id, []).append((place, modified_at))
    return [_run_info(store, run_id, found) for run_id, found in sorted(places.items())]


def find_dataset(store: ObjectStore, name: str, dataset_id: str) -> DatasetManifest | None:
    """The committed dataset of exactly this id, or None."""
    prefix = dataset_prefix(name, dataset_id)
    manifest = read_manifest(store, prefix, DatasetManifest)
    if manifest is not None and manifest.dataset_id != dataset_id:
        raise CheckpointCorruptError(
            f"{store.uri}/{prefix} holds dataset {manifest.dataset_id}, not {dataset_id}: it was copied or renamed. "
            "Move it back or delete it."
        )
    return manifest


def _run_info(store: ObjectStore, run_id: str, found: list[tuple[CheckpointPlace, datetime]]) -> RunInfo:
    latest = max((place for place, _ in found), key=lambda place: place.step)
    profile = None
    try:
        ref = read_checkpoint(store, latest.prefix)
        profile = ref.manifest.profile if ref else None
    except CheckpointCorruptError as error:
        _log.warning("%s", error)  # a list of runs is where an operator finds out, so it must still come
    return RunInfo(run_id, len(found), latest.step, profile, max(modified_at for _, modified_at in found))


def _committed_places(store: ObjectStore, prefix: str) -> Iterator[tuple[CheckpointPlace, datetime]]:
    for info in store.list(prefix):
        directory, _, name = info.key.rpartition("/")
        place = parse_checkpoint_prefix(directory) if name == MANIFEST_NAME else None
        if place is not None:
            yield place, info.modified_at


def _the_only(candidates: Sequence[CheckpointRef], where: str) -> CheckpointRef:
    if len(candidates) > 1:
        names = "".join(f"\n  {ref.uri}" for ref in candidates)
        raise CheckpointAmbiguousError(f"{where} there are {len(candidates)} lines. Name one by its URI:{names}")
    return candidates[0]


def _head_record(ref: CheckpointRef) -> bytes:
    # The nonce tells our own write from a rival's after a lost answer.
    record = {"checkpoint": ref.prefix, "step": ref.step, "fingerprint": ref.fingerprint, "nonce": secrets.token_hex(8)}
    return (json.dumps(record, indent=1) + "\n").encode()
