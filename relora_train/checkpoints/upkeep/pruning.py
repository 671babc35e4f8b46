"""Remove what the retention policy lets go (retention.py decides), and what killed writers left behind.

The order for one checkpoint is tombstone, manifest, files, claim. If a prune is killed, the next one finishes it; a
reader sees the whole checkpoint or none. Between tombstone and manifest all protections are read once more. A process
that begins to depend on a checkpoint writes that down first (pin, lease). Then it looks for a tombstone, so one of the
two sees the other. A lease allows one prune a run at a time.
Leftovers are files that no manifest lists, snapshots of finished stages, and half uploads. They go when nothing of them
was written for a grace period by the store's own clock. Those that a flow could still complete go only while no flow of
the run is under way, which a lease makes sure of.
"""

import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from relora_train.checkpoints.commit import CLAIM_NAME, deletion_order
from relora_train.checkpoints.layout import check_run_id, checkpoints_prefix, parse_checkpoint_prefix
from relora_train.checkpoints.lease import Lease, lease_key, read_lease, take_lease, try_lease
from relora_train.checkpoints.lineage import TOMBSTONE_NAME, CheckpointRef, Tombstone
from relora_train.checkpoints.manifest import MANIFEST_NAME
from relora_train.checkpoints.names import unknown_run
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.upkeep.retention import Protections, RetentionPolicy, Verdict, plan_pruning
from relora_train.errors import ObjectNotFoundError, StorageError
from relora_train.storage.base import ObjectInfo, ObjectStore

DEFAULT_GRACE = timedelta(hours=24)
_LEASE_SECONDS = 60.0


@dataclass(frozen=True)
class Leftover:
    """Objects of a dead attempt, or half an upload."""

    uri: str
    why: str
    size_bytes: int
    object_count: int


@dataclass(frozen=True)
class PruneReport:
    """The checkpoints that went, or would go in a dry run, and why the rest stays."""

    run_id: str
    dry_run: bool
    verdicts: tuple[Verdict, ...]
    leftovers: tuple[Leftover, ...]
    notes: tuple[str, ...]
    """The work that was left for a later prune, and why."""

    @property
    def removed(self) -> Sequence[CheckpointRef]:
        return [verdict.checkpoint for verdict in self.verdicts if not verdict.keep]

    @property
    def removed_bytes(self) -> int:
        """The bytes of checkpoints and leftovers together."""
        return sum(ref.manifest.size_bytes for ref in self.removed) + sum(left.size_bytes for left in self.leftovers)


def prune_run(
    store: ObjectStore,
    run_id: str,
    policy: RetentionPolicy | None,
    *,
    grace: timedelta = DEFAULT_GRACE,
    dry_run: bool = False,
) -> PruneReport:
    """Remove the checkpoints that neither policy nor anything else keeps, then leftovers. Safe to kill and to repeat.

    policy None: leftovers only. Nothing outside a local store is touched: StorageError where a symbolic link leads out.
    Raises CheckpointNotFoundError for a run of which the store holds nothing, RunInUseError while another prune of the
    run lives. If what may protect a checkpoint cannot be read, raises CheckpointCorruptError.
    """
    require_run(store, run_id)
    if dry_run:
        return _Pruning(store, run_id, grace, None).run(policy)
    key, what = f"runs/{run_id}/prune.json", f"Pruning of run {run_id!r}"
    with take_lease(store, key, what, ttl_seconds=_LEASE_SECONDS, purpose="prune") as lease:
        return _Pruning(store, run_id, grace, lease).run(policy)


def require_run(store: ObjectStore, run_id: str) -> None:
    """Refuse to remove anything of a run that the store does not hold, or that a symbolic link leads away from."""
    if not any(True for _ in store.list(f"runs/{check_run_id(run_id)}/")):
        raise unknown_run(store, run_id)
    for part in ("checkpoints", "snapshots"):  # below these no listing follows a link
        directory, root = store.local_path(f"runs/{run_id}/{part}"), store.local_path("runs")
        if directory and root and not directory.resolve().is_relative_to(root.parent.resolve()):
            raise StorageError(
                f"{directory} lies outside the store {store.uri}: a symbolic link leads to {directory.resolve()}. "
                "Nothing was removed. Name the store that really holds the run, or move the run into this one."
            )


class _Pruning:
    """One call of prune_run. Without a lease it is a dry run."""

    def __init__(self, store: ObjectStore, run_id: str, grace: timedelta, lease: Lease | None) -> None:
        self._store, self._run_id, self._grace, self._dry_run = store, run_id, grace, lease is None
        self._leases = [lease] if lease else []
        self._protections = Protections(store)
        self._run = CheckpointStore(store, run_id)
        self._now: datetime | None = None

    def run(self, policy: RetentionPolicy | None) -> PruneReport:
        if not self._dry_run:
            self._finish_removals()
        history = self._run.history()
        protected = self._protections.find()
        if policy is None:
            verdicts = [Verdict(ref, ("no policy",)) for ref in history if not ref.is_pruned]
        else:
            planned = plan_pruning(history, policy, protected)
            verdicts = [verdict if verdict.keep else self._remove(verdict.checkpoint) for verdict in planned]
        leftovers, notes = self._remove_leftovers()
        return PruneReport(self._run_id, self._dry_run, tuple(verdicts), tuple(leftovers), tuple(notes))

    def _delete(self, keys: Iterable[str]) -> None:
        """Delete, while this prune may: manifests first, claims last."""
        for key in () if self._dry_run else deletion_order(keys):
            self._check()
            self._store.delete(key)

    def _check(self) -> None:
        """Raise if another process has taken over a lease that this prune holds."""
        for lease in self._leases:
            lease.check()

    def _remove(self, ref: CheckpointRef) -> Verdict:
        """Remove one checkpoint, unless something has begun to depend on it since the plan was made."""
        if not self._dry_run:
            tombstone = f"{ref.prefix}/{TOMBSTONE_NAME}"
            self._check()
            record = Tombstone(reason="the retention policy does not keep it", manifest=ref.manifest)
            self._store.put_bytes(tombstone, record.to_bytes())
            if late := self._protections.find().get(ref.prefix):
                self._store.delete(tombstone)
                return Verdict(ref, tuple(late))
            self._sweep(ref.prefix)
        return Verdict(ref, ())

    def _finish_removals(self) -> None:
        """Take up what a killed prune began: back if it is whole and something needs it now, else to its end."""
        for prefix, objects in self._groups(checkpoints_prefix(self._run_id)).items():
            names = {info.key.removeprefix(f"{prefix}/") for info in objects}
            if TOMBSTONE_NAME not in names or not parse_checkpoint_prefix(prefix):
                continue
            committed = [ref for ref in self._run.list() if ref.prefix == prefix] if MANIFEST_NAME in names else []
            files = [(ref.manifest.key_of(entry, prefix), entry) for ref in committed for entry in ref.manifest.files]
            heads = ((self._store.head(key), entry) for key, entry in files)
            if committed and all(head is not None and head.size_bytes == entry.size_bytes for head, entry in heads):
                self._store.delete(f"{prefix}/{TOMBSTONE_NAME}")  # the plan decides anew
            elif names != {TOMBSTONE_NAME}:
                self._sweep(prefix)

    def _sweep(self, prefix: str) -> None:
        """Delete all that lies at a tombstone but the tombstone itself: manifest first, claim last."""
        keys = [info.key for info in self._store.list(f"{prefix}/")]
        self._delete(key for key in keys if key != f"{prefix}/{TOMBSTONE_NAME}")

    def _remove_leftovers(self) -> tuple[list[Leftover], list[str]]:
        leftovers, notes = [], []

        def remove(found: Iterable[tuple[str, str, Sequence[ObjectInfo]]]) -> None:
            for prefix, why, objects in found:
                self._delete(info.key for info in objects)
                size_bytes = sum(info.size_bytes for info in objects)
                leftovers.append(Leftover(f"{self._store.uri}/{prefix}", why, size_bytes, len(objects)))

        remove(list(self._outdated()))
        if unfinished := list(self._unfinished()):
            with self._no_flow() as is_idle:
                if is_idle:
                    remove(unfinished)
                else:
                    notes.append(f"{len(unfinished)} unfinished uploads stay while a flow of the run is under way")
        prefix = f"runs/{self._run_id}/"
        stale = self._store.abort_stale_uploads(self._old_before(), prefix=prefix, dry_run=self._dry_run)
        leftovers += [Leftover(f"{self._store.uri}/{name}", "half an upload", 0, 1) for name in stale]
        return leftovers, notes

    def _outdated(self) -> Iterator[tuple[str, str, Sequence[ObjectInfo]]]:
        """Yield objects beside a manifest that it does not list, as none ever will; snapshots of committed stages."""
        groups = self._groups(checkpoints_prefix(self._run_id))
        for ref in self._run.list():
            listed = {ref.manifest.key_of(entry, ref.prefix) for entry in ref.manifest.files}
            listed |= {f"{ref.prefix}/{name}" for name in (MANIFEST_NAME, CLAIM_NAME, TOMBSTONE_NAME)}
            objects = [info for info in groups.get(ref.prefix, ()) if info.key not in listed and self._is_old([info])]
            if objects:
                yield ref.prefix, "files that the manifest beside them does not list", objects
        done = {ref.fingerprint[:12] for ref in self._run.history()}
        for parent in self._snapshot_stages():
            objects = list(self._store.list(parent))
            if parent.split("/")[3] in done and self._is_old(objects):
                yield parent.rstrip("/"), "snapshots of a stage that is committed", objects

    def _unfinished(self) -> Iterator[tuple[str, str, Sequence[ObjectInfo]]]:
        """Yield uploads without a manifest that nobody has added to for the grace period."""
        for parent in (checkpoints_prefix(self._run_id), *self._snapshot_stages()):
            for prefix, objects in self._groups(parent).items():
                names = {info.key.rpartition("/")[2] for info in objects}
                if not names & {MANIFEST_NAME, TOMBSTONE_NAME} and self._is_old(objects):
                    yield prefix, "an upload that was never finished", objects

    def _snapshot_stages(self) -> Sequence[str]:
        return [f"{prefix}/" for prefix in self._groups(f"runs/{self._run_id}/snapshots/")]

    def _groups(self, parent: str) -> Mapping[str, Sequence[ObjectInfo]]:
        """Return the objects below a prefix by the directory that follows it."""
        groups: dict[str, list[ObjectInfo]] = defaultdict(list)
        for info in self._store.list(parent):
            directory, slash, _ = info.key.removeprefix(parent).partition("/")
            if slash:
                groups[parent + directory].append(info)
        return groups

    @contextmanager
    def _no_flow(self) -> Iterator[bool]:
        """Keep flows of this run from starting for the length of the block; False if one may be under way."""
        key = lease_key(self._run_id)

        def unheard_of() -> bool:
            info = self._store.head(key)
            return info is not None and self._is_old([info])

        if self._dry_run:
            found = read_lease(self._store, key)
            lives = found is not None and not found[0].released and found[0].holder.is_alive()
            yield not (lives or (lives is None and not unheard_of()))
            return
        lease = try_lease(self._store, key, unheard_of=unheard_of, ttl_seconds=_LEASE_SECONDS)
        if lease is None:
            yield False
            return
        self._leases.append(lease)
        try:
            yield True
        finally:
            self._leases.remove(lease)
            lease.release()

    def _is_old(self, objects: Sequence[ObjectInfo]) -> bool:
        return all(info.modified_at < self._old_before() for info in objects)

    def _old_before(self) -> datetime:
        """Return the moment before which a leftover was written, by the clock that dates the store's objects."""
        if self._now is None:
            key = f"preflight/{secrets.token_hex(8)}"
            self._store.put_bytes(key, key.encode(), if_absent=True)
            try:
                info = self._store.head(key)
            finally:
                self._store.delete(key)
            if info is None:
                raise ObjectNotFoundError(
                    f"{self._store.uri}/{key} is gone as soon as it is written. Look for a clean-up job."
                )
            self._now = info.modified_at
        return self._now - self._grace
