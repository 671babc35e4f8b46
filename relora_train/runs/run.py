"""One run in a store: its identity and settings, the datasets and checkpoints it reads, and the line it is on.

Manifests in the store alone say what has been done. `find.py` looks a stage up, `train.py` trains it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from relora_train.checkpoints.fetch import fetch_bundle, fetch_checkpoint
from relora_train.checkpoints.layout import dataset_prefix, split_checkpoint_uri
from relora_train.checkpoints.lease import Lease, hold_run
from relora_train.checkpoints.lineage import CheckpointRef, read_checkpoint, removal_at
from relora_train.checkpoints.manifest import DatasetManifest, find_dataset
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.view import RunView
from relora_train.errors import CheckpointNotFoundError, ReLoRAError
from relora_train.events import Event
from relora_train.runs.publishing import Publisher, publishing
from relora_train.runs.workers import KeptWorker, kept_worker
from relora_train.settings.keys import settings_digest
from relora_train.settings.profile import Profile, default_run_id
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import checkpoint_cache, dataset_cache

STORE_VARIABLE = "RELORA_STORE"
DEFAULT_STORE = "relora-store"

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Run:
    """Identity and settings of one run; in a session also what its one flow holds."""

    run_id: str
    store_uri: str
    profile: Profile
    branches: bool = False
    """True: started from a named checkpoint. Other settings are then meant, and live beside the run's own line."""
    lease: Lease | None = field(default=None, compare=False, repr=False)
    """Proof that this process is the run's one writer; None for a reader."""
    worker: KeptWorker | None = field(default=None, compare=False, repr=False)
    """The process that trains its stages; None for a process of its own each."""
    publisher: Publisher | None = field(default=None, compare=False, repr=False)
    """Stores checkpoints while later stages train; None to store each one before the next stage."""
    view: RunView | None = field(default=None, compare=False, repr=False)
    """The run as its flow knows it; None to ask the store at every question."""

    @cached_property
    def store(self) -> ObjectStore:
        return open_store(self.store_uri)

    @property
    def checkpoints(self) -> CheckpointStore:
        return self.view or CheckpointStore(self.store, self.run_id)

    def start_worker(self) -> None:
        """Start the reusable worker in the background, if there is one."""
        if self.worker is not None:
            self.worker.start(self.profile)

    def close(self) -> None:
        """End the reusable worker, if there is one: it holds memory of the device."""
        if self.worker is not None:
            self.worker.close()

    def check_lease(self) -> None:
        """Return only if no other flow writes this run by now; see Lease.check."""
        if self.lease is not None:
            self.lease.check()

    def raise_if_superseded(self) -> None:
        """Raise if the result of the current work can no longer be committed."""
        if self.lease is not None:
            self.lease.raise_if_lost()
        if self.publisher is not None:
            self.publisher.raise_if_superseded()

    def is_unstored(self, checkpoint: CheckpointRef | None) -> bool:
        """Return True if the checkpoint is still on its way into the store, where nothing made from it can be yet."""
        return self.publisher is not None and checkpoint is not None and not self.publisher.is_stored(checkpoint)

    def wait_until_stored(self, checkpoint: CheckpointRef) -> CheckpointRef:
        """Return the checkpoint as the store holds it, once it does; see Publisher.wait."""
        return checkpoint if self.publisher is None else self.publisher.wait(checkpoint)


@contextmanager
def session(run: Run, *, depends_on: Sequence[str] = ()) -> Iterator[Run]:
    """Be the only flow that trains a run for the length of the block; yield the run with what that takes.

    depends_on, and errors: as for hold_run.
    """
    with (
        hold_run(run.store, run.run_id, depends_on=depends_on) as lease,
        kept_worker() as worker,
        publishing(run.store) as publisher,
    ):
        view = RunView(run.store, run.run_id)
        yield replace(run, lease=lease, worker=worker, publisher=publisher, view=view)


@dataclass(frozen=True)
class DatasetRef:
    """One committed dataset in a store."""

    uri: str
    store_uri: str
    prefix: str
    manifest: DatasetManifest

    @property
    def dataset_id(self) -> str:
        return self.manifest.dataset_id


@dataclass(frozen=True)
class StageOutcome:
    """A stage's checkpoint, and how it came to be there."""

    checkpoint: CheckpointRef
    """The checkpoint in the store or, if it is not stored yet, as it will be."""
    reused: bool
    """True: it was committed already."""
    stored: bool = True
    """False: trained, durable on this machine, and the run's publisher has yet to store it."""


def default_store_uri() -> str:
    """Return $RELORA_STORE, else the directory relora-store where the command was given."""
    return os.environ.get(STORE_VARIABLE) or str(Path(DEFAULT_STORE).resolve())


def choose_run_id(profile: Profile, parent: CheckpointRef | None) -> str:
    """Return a run id for settings without one. The same settings and the same parent meet their own run again."""
    own = default_run_id(profile)
    if parent is None or parent.manifest.run_id == own:
        return own
    return f"{profile.name}-{settings_digest({'run': own, 'parent': parent.fingerprint})[:8]}"


def find_committed_dataset(store: ObjectStore, name: str, dataset_id: str) -> DatasetRef | None:
    """Return the dataset of exactly this id, or None."""
    manifest = find_dataset(store, name, dataset_id)
    return None if manifest is None else dataset_ref(store, manifest)


def dataset_ref(store: ObjectStore, manifest: DatasetManifest) -> DatasetRef:
    prefix = dataset_prefix(manifest.name, manifest.dataset_id)
    return DatasetRef(f"{store.uri}/{prefix}", store.uri, prefix, manifest)


def fetch_dataset(dataset: DatasetRef) -> Path:
    """Return a local directory with the dataset's verified files."""
    store = open_store(dataset.store_uri)
    return fetch_bundle(store, dataset.prefix, dataset.manifest, dataset_cache(dataset.dataset_id))


def fetch_parent(parent: CheckpointRef) -> Path:
    """Return a local directory with a checkpoint's verified files. Raise CheckpointNotFoundError if it was pruned."""
    store = open_store(parent.store_uri)
    if parent.is_pruned:
        raise CheckpointNotFoundError(removal_at(store, parent.prefix) or f"{parent.uri} is gone.")
    return fetch_checkpoint(parent, checkpoint_cache(parent.manifest.run_id), store=store)


def line_of(checkpoint: CheckpointRef | None, *, run: Run | None = None) -> list[CheckpointRef]:
    """Return the checkpoints that led to this one, oldest first, itself last, across runs and stores.

    Ends early, without an error, at an ancestor that was deleted: every checkpoint is complete without its parents.
    run: the one that a flow knows already, so that the store need not be asked.
    """
    line: list[CheckpointRef] = []
    current = checkpoint
    while current is not None:
        of_run = run is not None and (run.run_id, run.store.uri) == (current.manifest.run_id, current.store_uri)
        known = run.checkpoints if run and of_run else None
        known = known or CheckpointStore(open_store(current.store_uri), current.manifest.run_id)
        line = [*known.ancestry(current), *line]
        parent, current = line[0].manifest.parent, None
        if parent is not None and parent.fingerprint not in {ref.fingerprint for ref in line}:
            store_uri, prefix = split_checkpoint_uri(parent.uri)
            try:
                current = read_checkpoint(open_store(store_uri), prefix)
            except ReLoRAError:
                break
    return line


def line_to_head(run: Run, line: list[CheckpointRef]) -> list[CheckpointRef]:
    """Return the line and what the run has beyond its end, as after a command that added cycles to it."""
    whole = line_of(run.checkpoints.head(missing_ok=True), run=run)
    return whole if line and line[-1] in whole else line


def first_and_last(line: Sequence[CheckpointRef]) -> list[CheckpointRef]:
    """Return the checkpoints that are sampled from: the last one before any merge, and the last one."""
    before = [checkpoint for checkpoint in line if checkpoint.manifest.cycle == 0]
    chosen = [before[-1] if before else line[0], line[-1]]
    return chosen[:1] if chosen[0].fingerprint == chosen[1].fingerprint else chosen
