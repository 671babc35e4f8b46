"""The snapshots of one stage, in a store and on this machine: find the newest valid one, store, prune.

runs/<run_id>/snapshots/<12 hex of the stage's fingerprint>/step-<step>-<8 hex of the attempt>/ is one bundle
(commit.py); the same names lie below the local directory. A directory without a manifest is absent.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from relora_train.checkpoints.commit import commit_bundle, deletion_order
from relora_train.checkpoints.fetch import fetch_bundle, verify_bundle
from relora_train.checkpoints.layout import parse_snapshot_name, snapshots_prefix
from relora_train.checkpoints.manifest import MANIFEST_NAME, SnapshotManifest, parse_manifest, read_manifest
from relora_train.errors import CheckpointCorruptError, CheckpointError, CheckpointIncompleteError
from relora_train.storage.base import ObjectStore
from relora_train.storage.local import LocalStore

_log = logging.getLogger("relora_train.checkpoints.snapshots")


@dataclass(frozen=True)
class FoundSnapshot:
    """A verified snapshot on this machine's disk."""

    step: int
    directory: Path
    """Treat it as read-only."""
    stored: bool
    """True if the store holds it too."""


class SnapshotStore:
    """The snapshots of one stage. Its trainer leaves them in `local` on this machine."""

    def __init__(self, store: ObjectStore, run_id: str, fingerprint: str, local: Path, *, keep: int) -> None:
        self._store, self._fingerprint, self._local, self._keep = store, fingerprint, local, keep
        self._prefix = snapshots_prefix(run_id, fingerprint)
        self._damaged: set[str] = set()

    @property
    def uri(self) -> str:
        return f"{self._store.uri}/{self._prefix.rstrip('/')}"

    def newest_valid(self, *, local_only: bool = False) -> FoundSnapshot | None:
        """Return the newest snapshot with every byte as it was written, in the store or on this machine, or None.

        local_only: do not ask the store; its snapshots began from another result of the stage's parent.

        A damaged snapshot is passed over with a warning that names the next. A store that cannot be reached raises:
        older work is never taken for the newest. Call it only while nobody else works on this stage.
        """
        for path in self._local.glob("step-*"):  # of a killed trainer or download
            if not (path / MANIFEST_NAME).is_file():
                shutil.rmtree(path, ignore_errors=True)
        stored = set() if local_only else set(self._stored())
        local = set(local_snapshots(self._local))
        warning = ""
        for name in _newest_first(stored | local):
            step = _step(name)
            try:
                directory = self._fetched(name, stored=name in stored, local=name in local)
            except CheckpointError as error:
                self._damaged.add(name)
                warning += f"{error} "
                continue
            if warning:
                _log.warning("%sGoing on from the snapshot before it, at step %d.", warning, step)
            return FoundSnapshot(step, directory, name in stored)
        if warning:
            _log.warning("%sThere is no snapshot before it: the stage begins at its start.", warning)
        return None

    def upload(self, directory: Path) -> None:
        """Store a committed local snapshot, then remove all but the newest `keep` from the store. Safe to repeat."""
        commit_bundle(self._store, self._prefix + directory.name, directory, _read_local(directory))
        kept = [name for name in _newest_first(self._stored()) if name not in self._damaged][: self._keep]
        remove_snapshots(self._store, self._prefix, except_for={*kept, directory.name})

    def prune_local(self, *, in_use: Path | None = None) -> None:
        """Keep the newest `keep` committed snapshots on this machine, and one that is being read."""
        intact = [name for name in _newest_first(local_snapshots(self._local)) if name not in self._damaged]
        kept = {*intact[: self._keep], *([in_use.name] if in_use else [])}
        for name in set(local_snapshots(self._local)) - kept:
            self._remove_local(name)

    def _fetched(self, name: str, *, stored: bool, local: bool) -> Path:
        """Return a verified directory: the local one if it is sound, else a download."""
        if local:
            try:
                verify_bundle(LocalStore(self._local), name, self._checked(_read_local(self._local / name)))
                return self._local / name
            except CheckpointError:
                if not stored:
                    raise
                self._remove_local(name)
        prefix = self._prefix + name
        manifest = read_manifest(self._store, prefix, SnapshotManifest)
        if manifest is None:
            raise CheckpointIncompleteError(f"{self._store.uri}/{prefix} was removed while it was looked for.")
        return fetch_bundle(self._store, prefix, self._checked(manifest), self._local / name)

    def _checked(self, manifest: SnapshotManifest) -> SnapshotManifest:
        if manifest.fingerprint != self._fingerprint:
            raise CheckpointCorruptError(
                f"The snapshot of step {manifest.step} in {self.uri} is of another stage "
                f"({manifest.fingerprint[:12]}): it was copied or renamed."
            )
        return manifest

    def _stored(self) -> Iterator[str]:
        """Yield the names of the committed snapshots in the store."""
        for info in self._store.list(self._prefix):
            name, _, file = info.key.removeprefix(self._prefix).partition("/")
            if file == MANIFEST_NAME and parse_snapshot_name(name) is not None:
                yield name

    def _remove_local(self, name: str) -> None:
        (self._local / name / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(self._local / name, ignore_errors=True)


def remove_snapshots(store: ObjectStore, prefix: str, *, except_for: Set[str] = frozenset()) -> None:
    """Remove a stage's snapshots from a store, except the named ones. No half of one is ever visible."""
    keys = (info.key for info in store.list(prefix))
    for key in deletion_order(key for key in keys if key.removeprefix(prefix).partition("/")[0] not in except_for):
        store.delete(key)


def local_snapshots(directory: Path) -> list[str]:
    """Return the names of the committed snapshots in a local directory."""
    paths = directory.glob(f"step-*/{MANIFEST_NAME}")
    return [path.parent.name for path in paths if parse_snapshot_name(path.parent.name) is not None]


def _read_local(directory: Path) -> SnapshotManifest:
    path = directory / MANIFEST_NAME
    try:
        return parse_manifest(SnapshotManifest, path.read_bytes(), uri=path.as_uri())
    except FileNotFoundError:
        raise CheckpointIncompleteError(f"{path.as_uri()} is not there: the snapshot was dropped.") from None


def _newest_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (_step(name), name), reverse=True)


def _step(name: str) -> int:
    return parse_snapshot_name(name) or 0
