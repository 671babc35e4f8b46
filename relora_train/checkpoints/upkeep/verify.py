"""Read again all that a store holds of a run, and name what is missing, damaged or not accounted for.

Size and SHA-256 are checked for checkpoints, their snapshots and the datasets they name, one file at a time. Refs,
tombstones and leases are checked for sense. Memory is bounded; a store that is no local directory needs disk space for
its largest file.
Not covered: a manifest that was replaced by another valid one of the same work; runs in other stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import ConfigDict

from relora_train.checkpoints.commit import CLAIM_NAME
from relora_train.checkpoints.fetch import verify_bundle
from relora_train.checkpoints.layout import check_run_id, join_key, parse_checkpoint_prefix
from relora_train.checkpoints.lease import lease_key, read_lease
from relora_train.checkpoints.lineage import TOMBSTONE_NAME, CheckpointRef, read_checkpoint, read_tombstone
from relora_train.checkpoints.manifest import MANIFEST_NAME, DatasetManifest, Manifest, read_manifest
from relora_train.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    ObjectNotFoundError,
)
from relora_train.storage.base import ObjectInfo, ObjectStore, parse_json
from relora_train.storage.opening import open_store

_KNOWN_DIRECTORIES = ("diverged", "evaluations", "report")


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    kind: Literal["missing", "damaged", "unreferenced"]
    uri: str
    message: str


@dataclass
class Verification:
    """The objects that were read and the faults that were found; clean if there are none."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Objects that were not judged, and why."""
    bundles: int = 0
    files: int = 0
    size_bytes: int = 0

    @property
    def is_clean(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        return {"clean": self.is_clean, **asdict(self)}


def verify_checkpoint(ref: CheckpointRef) -> Verification:
    """Read every byte of one checkpoint and of the dataset it names, and look at what lies beside it."""
    checked = _Verifier(open_store(ref.store_uri))
    checked.checkpoint(ref)
    checked.dataset(ref.manifest.dataset_uri, ref.uri)
    if parse_checkpoint_prefix(ref.prefix):
        checked.checkpoint_neighbours(ref, checked.objects(f"{ref.prefix}/"))
    return checked.result


def verify_run(store: ObjectStore, run_id: str) -> Verification:
    """Read everything below runs/<run_id>/, and the datasets that its checkpoints name.

    Uncommitted work of a flow that is under way is a note, not a fault.
    """
    checked = _Verifier(store)
    objects = checked.objects(f"runs/{check_run_id(run_id)}/")
    if not objects:
        raise CheckpointNotFoundError(f"{store.uri} has no run {run_id!r}. See `relora runs`.")
    checked.run(run_id, objects)
    return checked.result


class _AnyManifest(Manifest):
    """A manifest of any kind of bundle, without its own fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Verifier:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.result = Verification()

    def objects(self, prefix: str) -> Sequence[ObjectInfo]:
        return list(self._store.list(prefix))

    def run(self, run_id: str, objects: Sequence[ObjectInfo]) -> None:
        base = f"runs/{run_id}/"
        is_live = self._is_live(run_id)
        datasets: dict[str, str] = {}
        for kind, directory, found in _by_directory(base, objects):
            if kind == "checkpoints":
                if ref := self._checkpoint_at(directory, found, is_live=is_live):
                    datasets.setdefault(ref.manifest.dataset_uri, ref.uri)
            elif kind == "snapshots":
                self._snapshots(base, directory, found, is_live=is_live)
            elif kind == "refs":
                self._refs(found)
            elif kind not in (*_KNOWN_DIRECTORIES, "lease.json", "prune.json"):
                self._find("unreferenced", directory, f"nothing that this version knows of; {_amount(found)}")
        for uri, user in datasets.items():
            self.dataset(uri, user)

    def checkpoint(self, ref: CheckpointRef) -> None:
        self._bundle(open_store(ref.store_uri), ref.prefix, ref.manifest)

    def dataset(self, uri: str, user: str) -> None:
        root, separator, rest = uri.rpartition("/datasets/")
        store = self._store if root == self._store.uri else open_store(root if separator else uri)
        prefix = f"datasets/{rest}" if separator else ""
        try:
            manifest = read_manifest(store, prefix, DatasetManifest)
        except CheckpointCorruptError as error:
            self._add("damaged", uri, str(error))
            return
        if manifest is None:
            self._add("missing", uri, f"the dataset of {user} is not there")
        else:
            self._bundle(store, prefix, manifest)

    def checkpoint_neighbours(self, ref: CheckpointRef, objects: Sequence[ObjectInfo]) -> None:
        """Report objects at a checkpoint's prefix that its manifest does not list."""
        listed = {ref.manifest.key_of(entry, ref.prefix) for entry in ref.manifest.files}
        listed |= {f"{ref.prefix}/{name}" for name in (MANIFEST_NAME, CLAIM_NAME)}
        for info in objects:
            if info.key == f"{ref.prefix}/{TOMBSTONE_NAME}":
                self._find("unreferenced", info.key, "a removal that was begun; `relora prune` settles it")
            elif info.key not in listed:
                self._find("unreferenced", info.key, "not in the manifest beside it; `relora prune` removes it")

    def _checkpoint_at(self, prefix: str, objects: Sequence[ObjectInfo], *, is_live: bool) -> CheckpointRef | None:
        names = {info.key.removeprefix(f"{prefix}/") for info in objects}
        if MANIFEST_NAME in names and parse_checkpoint_prefix(prefix):
            try:
                ref = read_checkpoint(self._store, prefix)
            except CheckpointCorruptError as error:
                self._find("damaged", f"{prefix}/{MANIFEST_NAME}", str(error))
                return None
            if ref is not None:
                self.checkpoint(ref)
                self.checkpoint_neighbours(ref, objects)
            return ref
        if TOMBSTONE_NAME in names:
            try:
                read_tombstone(self._store, prefix)
            except CheckpointCorruptError as error:
                self._find("damaged", f"{prefix}/{TOMBSTONE_NAME}", str(error))
            if names != {TOMBSTONE_NAME}:
                self._find("unreferenced", prefix, "a removal that was begun; `relora prune` ends it")
            return None
        self._unfinished(prefix, objects, is_live=is_live)
        return None

    def _snapshots(self, base: str, stage: str, objects: Sequence[ObjectInfo], *, is_live: bool) -> None:
        if self._is_done(base, stage.rpartition("/")[2]):
            self._find("unreferenced", stage, f"snapshots of a stage that is committed; {_amount(objects)}")
        for prefix, found in _by_manifest(stage, objects):
            try:
                manifest = read_manifest(self._store, prefix, _AnyManifest)
            except CheckpointCorruptError as error:
                self._find("damaged", f"{prefix}/{MANIFEST_NAME}", str(error))
                continue
            if manifest is None:
                self._unfinished(prefix, found, is_live=is_live)
            else:
                self._bundle(self._store, prefix, manifest)

    def _is_done(self, base: str, short_fingerprint: str) -> bool:
        for info in self._store.list(f"{base}checkpoints/"):
            directory, _, name = info.key.rpartition("/")
            place = parse_checkpoint_prefix(directory)
            if place and name in (MANIFEST_NAME, TOMBSTONE_NAME) and place.short_fingerprint == short_fingerprint:
                return True
        return False

    def _refs(self, objects: Sequence[ObjectInfo]) -> None:
        for info in objects:
            try:
                prefix = parse_json(self._store.get_bytes(info.key)[0])["checkpoint"]
                there = self._store.head(f"{prefix}/{MANIFEST_NAME}") if parse_checkpoint_prefix(prefix) else None
            except (ValueError, KeyError, TypeError):
                self._find("damaged", info.key, "it names no checkpoint")
                continue
            except ObjectNotFoundError:
                continue  # moved or unpinned since it was listed
            if there is None:
                self._find("missing", f"{prefix}", f"{info.key} names it, and it is not committed")

    def _bundle(self, store: ObjectStore, prefix: str, manifest: Manifest) -> None:
        self.result.bundles += 1
        before = len(self.result.findings)
        for entry in manifest.files:
            uri = f"{store.uri}/{manifest.key_of(entry, prefix)}"
            try:
                verify_bundle(store, prefix, manifest.model_copy(update={"files": (entry,)}))
            except CheckpointIncompleteError as error:
                self._add("missing", uri, str(error))
            except CheckpointCorruptError as error:
                self._add("damaged", uri, str(error))
            self.result.files += 1
            self.result.size_bytes += entry.size_bytes
        if len(self.result.findings) > before and store.head(join_key(prefix, MANIFEST_NAME)) is None:
            del self.result.findings[before:]
            self.result.notes.append(f"{store.uri}/{prefix} was removed while it was read")

    def _unfinished(self, prefix: str, objects: Sequence[ObjectInfo], *, is_live: bool) -> None:
        if is_live:
            self.result.notes.append(f"{self._store.uri}/{prefix} has no manifest yet; a flow of the run is under way")
        else:
            what = (
                f"an upload that was never finished, {_amount(objects)}; the run's next flow or `relora prune` ends it"
            )
            self._find("unreferenced", prefix, what)

    def _is_live(self, run_id: str) -> bool:
        try:
            found = read_lease(self._store, lease_key(run_id))
        except CheckpointCorruptError as error:
            self._find("damaged", lease_key(run_id), str(error))
            return False
        return found is not None and not found[0].released and found[0].holder.is_alive() is not False

    def _find(self, kind: Literal["missing", "damaged", "unreferenced"], key: str, message: str) -> None:
        self._add(kind, f"{self._store.uri}/{key}", message)

    def _add(self, kind: Literal["missing", "damaged", "unreferenced"], uri: str, message: str) -> None:
        self.result.findings.append(Finding(kind, uri, message))


def _by_directory(base: str, objects: Sequence[ObjectInfo]) -> Iterator[tuple[str, str, Sequence[ObjectInfo]]]:
    """Yield kind, directory and objects of each part of a run: a checkpoint, a stage's snapshots, all refs…"""
    groups: dict[tuple[str, str], list[ObjectInfo]] = {}
    for info in objects:
        kind, *rest = info.key.removeprefix(base).split("/")
        nested = kind in ("checkpoints", "snapshots") and len(rest) > 1
        if kind in ("checkpoints", "snapshots", "refs") and not rest:
            kind = "unknown"
        directory = f"{base}{kind}/{rest[0]}" if nested else info.key
        if kind in ("checkpoints", "snapshots") and not nested:
            kind = "unknown"
        groups.setdefault((kind, base + kind if kind == "refs" else directory), []).append(info)
    for (kind, directory), found in groups.items():
        yield kind, directory, found


def _by_manifest(parent: str, objects: Sequence[ObjectInfo]) -> Iterator[tuple[str, Sequence[ObjectInfo]]]:
    """Yield objects by the nearest directory above them with a manifest, else by the one that follows `parent`."""
    with_manifest = {info.key.rpartition("/")[0] for info in objects if info.key.endswith(f"/{MANIFEST_NAME}")}
    groups: dict[str, list[ObjectInfo]] = {}
    for info in objects:
        above = [str(path) for path in PurePosixPath(info.key).parents]
        first = info.key.removeprefix(f"{parent}/").partition("/")[0]
        fallback = f"{parent}/{first}" if f"{parent}/{first}" != info.key else parent
        groups.setdefault(next((path for path in above if path in with_manifest), fallback), []).append(info)
    yield from groups.items()


def _amount(objects: Sequence[ObjectInfo]) -> str:
    return f"{len(objects)} objects of {sum(info.size_bytes for info in objects):,} bytes"
