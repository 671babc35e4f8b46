"""Read again all that a store holds of a run, and name what is missing, damaged or not accounted for.

Size and SHA-256 are checked for checkpoints, their snapshots and the datasets they name, one file at a time. Refs,
tombstones and leases are checked for sense. Memory is bounded; a store that is no local directory needs disk space for
its largest file.
Not covered: a manifest that was replaced by another valid one of the same work; runs in other stores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from pydantic import ConfigDict

from relora_train.checkpoints.commit import CLAIM_NAME
from relora_train.checkpoints.fetch import verify_bundle
from relora_train.checkpoints.layout import check_run_id, dataset_prefix, join_key, parse_checkpoint_prefix
from relora_train.checkpoints.lease import lease_key, read_lease
from relora_train.checkpoints.lineage import TOMBSTONE_NAME, CheckpointRef, read_checkpoint, read_tombstone
from relora_train.checkpoints.manifest import MANIFEST_NAME, DatasetManifest, Manifest, read_manifest
from relora_train.checkpoints.names import unknown_run
from relora_train.checkpoints.status import STATUS_NAME
from relora_train.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
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


def verify_checkpoint(ref: CheckpointRef) -> Verification:
    """Read every byte of one checkpoint and of the dataset it names, and look at what lies beside it."""
    store = open_store(ref.store_uri)
    checked = _Verifier(store)
    checked.bundle(store, ref.prefix, ref.manifest)
    checked.dataset(ref.manifest.dataset_uri, ref.uri)
    if parse_checkpoint_prefix(ref.prefix):
        checked.neighbours(ref, list(store.list(f"{ref.prefix}/")))
    return checked.result


def verify_run(store: ObjectStore, run_id: str) -> Verification:
    """Read everything below runs/<run_id>/, and the datasets that its checkpoints name.

    Uncommitted work of a flow that is under way is a note, not a fault.
    """
    checked = _Verifier(store)
    objects = list(store.list(f"runs/{check_run_id(run_id)}/"))
    if not objects:
        raise unknown_run(store, run_id)
    checked.run(run_id, objects)
    return checked.result


class _AnyManifest(Manifest):
    """A manifest of any kind of bundle, without its own fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Verifier:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.result = Verification()

    def run(self, run_id: str, objects: Sequence[ObjectInfo]) -> None:
        base = f"runs/{run_id}/"
        try:
            lease = read_lease(self._store, lease_key(run_id))
            is_live = lease is not None and not lease[0].released and lease[0].holder.is_alive() is not False
        except CheckpointCorruptError as error:
            self._find("damaged", lease_key(run_id), str(error))
            is_live = False
        places = [parse_checkpoint_prefix(info.key.rpartition("/")[0]) for info in objects]
        done = {
            place.short_fingerprint
            for info, place in zip(objects, places, strict=True)
            if place and info.key.endswith((f"/{MANIFEST_NAME}", f"/{TOMBSTONE_NAME}"))
        }
        parts: dict[tuple[str, str], list[ObjectInfo]] = {}  # by kind and directory: a checkpoint, a stage's snapshots
        for info in objects:
            kind, *rest = info.key.removeprefix(base).split("/")
            if kind in ("checkpoints", "snapshots") and len(rest) > 1:
                part = kind, f"{base}{kind}/{rest[0]}"
            elif kind == "refs" and rest:
                part = kind, f"{base}refs"
            else:
                part = "unknown" if kind in ("checkpoints", "snapshots", "refs") else kind, info.key
            parts.setdefault(part, []).append(info)
        datasets: dict[str, str] = {}
        for (kind, directory), found in parts.items():
            if kind == "checkpoints":
                if ref := self._checkpoint(directory, found, is_live=is_live):
                    datasets.setdefault(ref.manifest.dataset_uri, ref.uri)
            elif kind == "snapshots":
                if directory.rpartition("/")[2] in done:
                    what = f"snapshots of a stage that is committed; {_amount(found)}"
                    self._find("unreferenced", directory, what)
                self._snapshots(directory, found, is_live=is_live)
            elif kind == "refs":
                for info in found:
                    try:
                        prefix = parse_json(self._store.get_bytes(info.key)[0])["checkpoint"]
                        place = parse_checkpoint_prefix(prefix)
                        if place is None or self._store.head(f"{prefix}/{MANIFEST_NAME}") is None:
                            self._find("missing", f"{prefix}", f"{info.key} names it, and it is not committed")
                    except (ValueError, KeyError, TypeError):
                        self._find("damaged", info.key, "it names no checkpoint")
                    except ObjectNotFoundError:
                        continue  # moved or unpinned since it was listed
            elif kind not in (*_KNOWN_DIRECTORIES, "lease.json", "prune.json", STATUS_NAME):
                self._find("unreferenced", directory, f"nothing that this version knows of; {_amount(found)}")
        for uri, user in datasets.items():
            self.dataset(uri, user)

    def bundle(self, store: ObjectStore, prefix: str, manifest: Manifest) -> None:
        self.result.bundles += 1
        before = len(self.result.findings)
        for entry in manifest.files:
            uri = f"{store.uri}/{manifest.key_of(entry, prefix)}"
            try:
                verify_bundle(store, prefix, manifest.model_copy(update={"files": (entry,)}))
            except CheckpointIncompleteError as error:
                self._find("missing", uri, str(error))
            except CheckpointCorruptError as error:
                self._find("damaged", uri, str(error))
            self.result.files += 1
            self.result.size_bytes += entry.size_bytes
        if len(self.result.findings) > before and store.head(join_key(prefix, MANIFEST_NAME)) is None:
            del self.result.findings[before:]
            self.result.notes.append(f"{store.uri}/{prefix} was removed while it was read")

    def dataset(self, uri: str, user: str) -> None:
        root, separator, rest = uri.rpartition("/datasets/")
        store = self._store if root == self._store.uri else open_store(root if separator else uri)
        prefix = f"datasets/{rest}" if separator else ""
        try:
            manifest = read_manifest(store, prefix, DatasetManifest)
        except CheckpointCorruptError as error:
            self._find("damaged", uri, str(error))
            return
        if manifest is None:
            self._find("missing", uri, f"the dataset of {user} is not there")
            return
        self.bundle(store, prefix, manifest)
        for part in manifest.mixture:
            self.dataset(f"{store.uri}/{dataset_prefix(part.name, part.dataset_id)}", f"mixture {uri}")

    def neighbours(self, ref: CheckpointRef, objects: Sequence[ObjectInfo]) -> None:
        """Report objects at a checkpoint's prefix that its manifest does not list."""
        listed = {ref.manifest.key_of(entry, ref.prefix) for entry in ref.manifest.files}
        listed |= {f"{ref.prefix}/{name}" for name in (MANIFEST_NAME, CLAIM_NAME)}
        for info in objects:
            if info.key == f"{ref.prefix}/{TOMBSTONE_NAME}":
                self._find("unreferenced", info.key, "a removal that was begun; `relora prune` settles it")
            elif info.key not in listed:
                self._find("unreferenced", info.key, "not in the manifest beside it; `relora prune` removes it")

    def _checkpoint(self, prefix: str, objects: Sequence[ObjectInfo], *, is_live: bool) -> CheckpointRef | None:
        names = {info.key.removeprefix(f"{prefix}/") for info in objects}
        if MANIFEST_NAME in names and parse_checkpoint_prefix(prefix):
            try:
                ref = read_checkpoint(self._store, prefix)
            except CheckpointCorruptError as error:
                self._find("damaged", f"{prefix}/{MANIFEST_NAME}", str(error))
                return None
            if ref is not None:
                self.bundle(self._store, ref.prefix, ref.manifest)
                self.neighbours(ref, objects)
            return ref
        if TOMBSTONE_NAME not in names:
            self._unfinished(prefix, objects, is_live=is_live)
            return None
        try:
            read_tombstone(self._store, prefix)
        except CheckpointCorruptError as error:
            self._find("damaged", f"{prefix}/{TOMBSTONE_NAME}", str(error))
        if names != {TOMBSTONE_NAME}:
            self._find("unreferenced", prefix, "a removal that was begun; `relora prune` ends it")
        return None

    def _snapshots(self, stage: str, objects: Sequence[ObjectInfo], *, is_live: bool) -> None:
        # An object belongs to the nearest directory above it with a manifest, else to the one that follows `stage`.
        bundles = {info.key.rpartition("/")[0] for info in objects if info.key.endswith(f"/{MANIFEST_NAME}")}
        groups: dict[str, list[ObjectInfo]] = {}
        for info in objects:
            first = f"{stage}/{info.key.removeprefix(f'{stage}/').partition('/')[0]}"
            above = (str(path) for path in PurePosixPath(info.key).parents)
            prefix = next((path for path in above if path in bundles), first if first != info.key else stage)
            groups.setdefault(prefix, []).append(info)
        for prefix, found in groups.items():
            try:
                manifest = read_manifest(self._store, prefix, _AnyManifest)
            except CheckpointCorruptError as error:
                self._find("damaged", f"{prefix}/{MANIFEST_NAME}", str(error))
                continue
            if manifest is None:
                self._unfinished(prefix, found, is_live=is_live)
            else:
                self.bundle(self._store, prefix, manifest)

    def _unfinished(self, prefix: str, objects: Sequence[ObjectInfo], *, is_live: bool) -> None:
        if is_live:
            self.result.notes.append(f"{self._store.uri}/{prefix} has no manifest yet; a flow of the run is under way")
            return
        what = f"an upload that was never finished, {_amount(objects)}; the run's next flow or `relora prune` ends it"
        self._find("unreferenced", prefix, what)

    def _find(self, kind: Literal["missing", "damaged", "unreferenced"], place: str, message: str) -> None:
        """Note a fault at a URI, or at a key of this store."""
        uri = place if "://" in place else f"{self._store.uri}/{place}"
        self.result.findings.append(Finding(kind, uri, message))


def _amount(objects: Sequence[ObjectInfo]) -> str:
    return f"{len(objects)} objects of {sum(info.size_bytes for info in objects):,} bytes"
