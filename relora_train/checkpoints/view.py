"""A run's checkpoints as one flow knows them, so that no stage asks the store again for what cannot have changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from relora_train.checkpoints.lineage import CheckpointRef, in_order
from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.checkpoints.run import CheckpointStore, Head
from relora_train.errors import CheckpointNotFoundError, PreconditionFailedError, StorageError
from relora_train.storage.base import ObjectStore


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
