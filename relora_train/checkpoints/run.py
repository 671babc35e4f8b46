"""The merge checkpoints of one run in one store: commit, list, and the head that names the run's line.

A listing shows exactly what can be read: a prefix without manifest.json is absent. `names.py` chooses a checkpoint by
name, such as RUN@cycle-2.
"""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.fetch import fetched_directory, keep_fetched
from relora_train.checkpoints.layout import (
    HEAD_NAME,
    check_run_id,
    checkpoint_prefix,
    checkpoints_prefix,
    parse_checkpoint_prefix,
)
from relora_train.checkpoints.lineage import (
    TOMBSTONE_NAME,
    CheckpointRef,
    end_of_line,
    in_order,
    line_to,
    make_ref,
    read_checkpoint,
    read_tombstone,
    removal_at,
    without_pruned_ends,
)
from relora_train.checkpoints.manifest import MANIFEST_NAME, CheckpointManifest
from relora_train.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    ConfigError,
    PreconditionFailedError,
    StorageError,
)
from relora_train.storage.base import ObjectStore, find_bytes, parse_json, put_json

_HEAD_ATTEMPTS = 5


class Head(NamedTuple):
    """The prefix of the checkpoint that refs/head.json names, and the etag of that record."""

    prefix: str
    etag: str


class CheckpointStore:
    """The checkpoints of one run. Every answer is read from the store at the time of the call; see also RunView."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self.store = store
        self.run_id = check_run_id(run_id)
        self._head_key = f"runs/{run_id}/refs/{HEAD_NAME}"

    def refresh(self) -> None:
        """Forget what is known of the run: nothing here, much in a RunView."""

    def commit(
        self, directory: Path, manifest: CheckpointManifest, *, check_lease: Callable[[], None] = lambda: None
    ) -> CheckpointRef:
        """Commit a directory as the checkpoint of its fingerprint, or adopt what another attempt committed.

        All or nothing, the first one wins, safe to repeat: see commit.py. Does not move the head.
        """
        if manifest.run_id != self.run_id:
            raise ConfigError(f"A checkpoint of run {manifest.run_id!r} cannot be committed to run {self.run_id!r}.")
        ref = self.place_of(manifest)
        committed = commit_bundle(self.store, ref.prefix, directory, manifest, check_lease=check_lease)
        return replace(ref, manifest=committed)

    def place_of(self, manifest: CheckpointManifest) -> CheckpointRef:
        """Return the checkpoint as it will be once it is committed. The store is not asked."""
        return make_ref(self.store, checkpoint_prefix(self.run_id, manifest.step, manifest.fingerprint), manifest)

    def list(self) -> Sequence[CheckpointRef]:
        """Return all committed checkpoints by step. Raise CheckpointCorruptError for a damaged manifest."""
        refs, faults = self.survey()
        if faults:
            raise faults[0]
        return refs

    def survey(self) -> tuple[Sequence[CheckpointRef], Sequence[CheckpointCorruptError]]:
        """Return the committed checkpoints that can be read, by step, and what is wrong with the others."""
        refs, faults = [], []
        for prefix in self._listing()[0]:
            try:
                refs.append(self._read(prefix))
            except CheckpointCorruptError as error:
                faults.append(error)
        return in_order(ref for ref in refs if ref is not None), faults

    def history(self) -> Sequence[CheckpointRef]:
        """Return all checkpoints by step, with those that retention removed: the lineage without gaps."""
        committed, removed = self._listing()
        refs = {prefix: self._read(prefix) for prefix in committed}
        for prefix in {*removed, *committed}:
            # A manifest that went since it was listed has left a tombstone.
            if refs.get(prefix) is None and (tombstone := read_tombstone(self.store, prefix)):
                refs[prefix] = replace(make_ref(self.store, prefix, tombstone.manifest), is_pruned=True)
        return in_order(ref for ref in refs.values() if ref is not None)

    def find_pruned(self, fingerprint: str) -> CheckpointRef | None:
        """Return the checkpoint of exactly this work that was pruned after others had been trained from it, or None.

        Raises CheckpointNotFoundError if nothing that came from it is left either.
        """
        history = self.history()
        for ref in history:
            if ref.is_pruned and ref.fingerprint == fingerprint:
                if any(ref in line_to(other, history) for other in history if not other.is_pruned):
                    return ref
                if removal := removal_at(self.store, ref.prefix):
                    raise CheckpointNotFoundError(removal)
        return None

    def keep(self, ref: CheckpointRef, made: CheckpointManifest, directory: Path, cache_dir: Path) -> None:
        """Move what was committed as `ref` from `directory` to where `fetch` looks for it; see keep_fetched."""
        keep_fetched(self.store, made, ref.manifest, directory, fetched_directory(ref, cache_dir))

    def head(self, *, missing_ok: bool = False) -> CheckpointRef | None:
        """Return the checkpoint that refs/head.json names, or None if the run has no head yet.

        If that checkpoint was deleted, raise CheckpointNotFoundError, or with missing_ok return None.
        """
        ref, found = self._head()
        if ref is None and found is not None and not missing_ok:
            raise CheckpointNotFoundError(
                f"{self.store.uri}/{self._head_key} names {found.prefix}, which is not committed: it was deleted. "
                f"Restore it, or delete {self._head_key} and name the checkpoint to go on from."
            )
        return ref

    def set_head(self, ref: CheckpointRef) -> CheckpointRef:
        """Make a checkpoint the head and return the head there is now. Never loses another writer's move.

        A head that already descends from `ref` stays: repeating old work does not send a run back. A sideways move
        (a branch becomes the run's line) is made, and a head whose checkpoint was deleted is replaced. If another
        writer moves the head sideways at the same moment, raise PreconditionFailedError.
        """
        place = parse_checkpoint_prefix(ref.prefix)
        if ref.store_uri != self.store.uri or place is None or place.run_id != self.run_id:
            raise ConfigError(f"{ref.uri} cannot be the head of run {self.run_id!r} in {self.store.uri}: not its own.")
        first_seen: CheckpointRef | None = None
        for attempt in range(_HEAD_ATTEMPTS):
            head, found = self._head()
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
                self._write_head(ref, found and found.etag)
                return ref
            except PreconditionFailedError:
                continue
        raise PreconditionFailedError(
            f"The head of run {self.run_id!r} changed {_HEAD_ATTEMPTS} times while it was being moved to {ref.uri}. "
            "Stop the other flows of this run, then run again."
        )

    def latest(self) -> CheckpointRef | None:
        """Return the end of the run's line: the head, then on along single children. A lost head costs nothing.

        Without a head, the end of the only line there is; None for an empty run. Two candidates raise
        CheckpointAmbiguousError, which names them. The highest number in a listing never decides.
        """
        refs, head = self.history(), self.head()
        return end_of_line(without_pruned_ends(refs), head, run_id=self.run_id)

    def ancestry(self, ref: CheckpointRef) -> Sequence[CheckpointRef]:
        """Return the checkpoints of this run that led to `ref` and are still there, oldest first, itself last."""
        return [known for known in line_to(ref, self.history()) if not known.is_pruned]

    def _listing(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the prefixes that hold a manifest, and those that hold a tombstone."""
        found: dict[str, list[str]] = {MANIFEST_NAME: [], TOMBSTONE_NAME: []}
        for info in self.store.list(checkpoints_prefix(self.run_id)):
            prefix, _, name = info.key.rpartition("/")
            if name in found and parse_checkpoint_prefix(prefix):
                found[name].append(prefix)
        return found[MANIFEST_NAME], found[TOMBSTONE_NAME]

    def _read(self, prefix: str) -> CheckpointRef | None:
        return read_checkpoint(self.store, prefix)

    def _head(self) -> tuple[CheckpointRef | None, Head | None]:
        """Return the head's checkpoint, or None if there is none or it was deleted, and the head's record."""
        found = find_bytes(self.store, self._head_key)
        if found is None:
            return None, None
        try:
            place = parse_checkpoint_prefix(parse_json(found[0])["checkpoint"])
        except (ValueError, KeyError, TypeError):
            place = None
        if place is None or place.run_id != self.run_id:
            raise CheckpointCorruptError(
                f"{self.store.uri}/{self._head_key} is damaged: it names no checkpoint of run {self.run_id!r}. "
                "Delete it and name the checkpoint to go on from."
            )
        return self._read(place.prefix), Head(place.prefix, found[1])

    def _write_head(self, ref: CheckpointRef, etag: str | None) -> Head:
        """Make a checkpoint the head if the record still has this etag; None: if there is no record."""
        # The nonce tells our own write from a rival's after a lost answer.
        record = {
            "checkpoint": ref.prefix, "step": ref.step, "fingerprint": ref.fingerprint, "nonce": secrets.token_hex(8)
        }  # fmt: skip
        etag = put_json(self.store, self._head_key, record, if_absent=etag is None, if_match=etag)
        return Head(ref.prefix, etag)


class RunView(CheckpointStore):
    """A run, read once and then kept up by what is committed through this object.

    For the flow that holds the run's lease: no other one commits or moves the head meanwhile. Every write stays
    conditional, and one that fails has the run read again. A prune beside the flow may remove what the view still
    shows. It never removes the head, the end of a line, or what the lease says the flow started from.
    """

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        super().__init__(store, run_id)
        self._lock = threading.RLock()  # a publisher commits beside the flow's own thread
        self._manifests: dict[str, CheckpointRef] = {}  # by prefix; a manifest never changes
        self._committed: dict[str, CheckpointRef] = {}  # by this flow
        self._history: Sequence[CheckpointRef] | None = None
        self._known_head: tuple[CheckpointRef | None, Head | None] | None = None

    def refresh(self) -> None:
        """Read listing and head again when they are next asked for."""
        with self._lock:
            self._history = self._known_head = None

    def history(self) -> Sequence[CheckpointRef]:
        """Return all checkpoints by step, as they were when the run was read, and what this flow has committed."""
        with self._lock:
            if self._history is None:
                self._history = super().history()
            return in_order({**self._committed, **{ref.prefix: ref for ref in self._history}}.values())

    def list(self) -> Sequence[CheckpointRef]:
        """Return the committed checkpoints among them."""
        return [ref for ref in self.history() if not ref.is_pruned]

    def commit(
        self, directory: Path, manifest: CheckpointManifest, *, check_lease: Callable[[], None] = lambda: None
    ) -> CheckpointRef:
        """Commit as a CheckpointStore does, and remember the result."""
        try:
            ref = super().commit(directory, manifest, check_lease=check_lease)
        except PreconditionFailedError:
            self.refresh()
            raise
        with self._lock:
            self._committed[ref.prefix] = self._manifests[ref.prefix] = ref
        return ref

    def set_head(self, ref: CheckpointRef) -> CheckpointRef:
        """Move the head as a CheckpointStore does. Look again first if a prune may have removed `ref` meanwhile."""
        head, _ = self._head()
        if ref.prefix not in self._committed and not (head and ref in self.ancestry(head)):
            self.refresh()
            if ref not in self.list():
                raise CheckpointNotFoundError(f"{ref.uri} was pruned meanwhile. Run the same command again.")
        return super().set_head(ref)

    def _read(self, prefix: str) -> CheckpointRef | None:
        with self._lock:
            if prefix not in self._manifests and (ref := super()._read(prefix)):
                self._manifests[prefix] = ref
            return self._manifests.get(prefix)

    def _head(self) -> tuple[CheckpointRef | None, Head | None]:
        with self._lock:
            if self._known_head is None:
                self._known_head = super()._head()
            return self._known_head

    def _write_head(self, ref: CheckpointRef, etag: str | None) -> Head:
        try:
            written = super()._write_head(ref, etag)
        except StorageError:  # another writer's move, or an answer that was lost
            self.refresh()
            raise
        with self._lock:
            self._known_head = ref, written
        return written
