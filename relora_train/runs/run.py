"""One run and its stages in a store: what is done already, and doing what is not. No Prefect, no torch. Light.

The tasks are thin shells around this module. What has been done is what the store's manifests say, nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from relora_train.checkpoints.fetch import check_local, fetch_bundle
from relora_train.checkpoints.layout import dataset_prefix, split_checkpoint_uri
from relora_train.checkpoints.lease import Lease
from relora_train.checkpoints.lineage import CheckpointRef, choose_result, read_checkpoint, set_aside
from relora_train.checkpoints.manifest import DatasetManifest, ParentRef, find_dataset, hash_file
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.snapshots import SnapshotStore
from relora_train.checkpoints.tombstone import read_tombstone, removed_message
from relora_train.data.dataset_changes import dataset_changes
from relora_train.errors import (
    AccessDeniedError,
    CheckpointNotFoundError,
    ObjectNotFoundError,
    ReLoRAError,
    RunSettingsChangedError,
    StoreUnavailableError,
)
from relora_train.events import Event
from relora_train.method.fingerprint import fingerprint_settings, stage_fingerprint
from relora_train.method.stages import Stage
from relora_train.runs.kept_worker import KeptWorker
from relora_train.runs.launch import nodes_of, run_worker
from relora_train.runs.publishing import Publisher
from relora_train.runs.snapshot_uploader import SnapshotUploader
from relora_train.runs.stage_work import (
    MadeStage,
    begin_work,
    committed_output,
    left_output,
    store_later,
    store_now,
    tidy_up,
    work_name,
)
from relora_train.settings.keys import differing_settings, settings_digest
from relora_train.settings.model import ModelConfig
from relora_train.settings.profile import Profile, default_run_id
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import WorkDirectory, checkpoint_cache, dataset_cache
from relora_train.training.requests import StageRequest

STORE_VARIABLE = "RELORA_STORE"
DEFAULT_STORE = "relora-store"

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Run:
    """Identity and settings of one run."""

    run_id: str
    store_uri: str
    profile: Profile
    branches: bool = False
    """Started from a named checkpoint: other settings are then meant, and live beside the run's own line."""
    lease: Lease | None = field(default=None, compare=False, repr=False)
    """That this process is the run's one writer; None for who only reads."""
    worker: KeptWorker | None = field(default=None, compare=False, repr=False)
    """The process that trains its stages; None for one of its own each."""
    publisher: Publisher | None = field(default=None, compare=False, repr=False)
    """Who stores its checkpoints while later stages train; None to have each stored before the next stage."""

    @cached_property
    def store(self) -> ObjectStore:
        return open_store(self.store_uri)

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.store, self.run_id)

    def start_worker(self) -> None:
        """Have the worker, if it is kept, get ready meanwhile."""
        if self.worker is not None:
            self.worker.start(self.profile)

    def check_lease(self) -> None:
        """Return only if no other flow writes this run by now; see Lease.check."""
        if self.lease is not None:
            self.lease.check()

    def raise_if_in_vain(self) -> None:
        """End work of which nothing could be committed: the lease is lost, or what it began from is not the record."""
        if self.lease is not None:
            self.lease.raise_if_lost()
        if self.publisher is not None:
            self.publisher.raise_if_superseded()

    def is_unstored(self, checkpoint: CheckpointRef | None) -> bool:
        """Return True if the checkpoint is still on its way into the store, where nothing made from it can be yet."""
        return self.publisher is not None and checkpoint is not None and not self.publisher.is_stored(checkpoint)

    def wait_until_stored(self, checkpoint: CheckpointRef) -> CheckpointRef:
        """The checkpoint as the store holds it, once it does; see Publisher.wait."""
        return checkpoint if self.publisher is None else self.publisher.wait(checkpoint)


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
    """A stage's checkpoint, and whether it was there already."""

    checkpoint: CheckpointRef
    """Where it is, or, while it is not stored, will be."""
    reused: bool
    stored: bool = True
    """False: trained, durable on this machine, and the run's publisher has yet to store it."""


def default_store_uri() -> str:
    """$RELORA_STORE, else the directory relora-store where the command was given."""
    return os.environ.get(STORE_VARIABLE) or str(Path(DEFAULT_STORE).resolve())


def choose_run_id(profile: Profile, parent: CheckpointRef | None) -> str:
    """A run id for settings that were given none: the same settings, and the same parent, meet their own run again."""
    own = default_run_id(profile)
    if parent is None or parent.manifest.run_id == own:
        return own
    return f"{profile.name}-{settings_digest({'run': own, 'parent': parent.fingerprint})[:8]}"


def find_committed_dataset(store: ObjectStore, name: str, dataset_id: str) -> DatasetRef | None:
    """The dataset of exactly this id, or None."""
    manifest = find_dataset(store, name, dataset_id)
    return None if manifest is None else dataset_ref(store, manifest)


def dataset_ref(store: ObjectStore, manifest: DatasetManifest) -> DatasetRef:
    prefix = dataset_prefix(manifest.name, manifest.dataset_id)
    return DatasetRef(f"{store.uri}/{prefix}", store.uri, prefix, manifest)


def fetch_dataset(dataset: DatasetRef) -> Path:
    """The dataset's verified files on this machine's disk."""
    store = open_store(dataset.store_uri)
    return fetch_bundle(store, dataset.prefix, dataset.manifest, dataset_cache(dataset.dataset_id))


def fetch_parent(parent: CheckpointRef) -> Path:
    """A checkpoint's verified files on this machine's disk. One that retention removed is a CheckpointNotFoundError."""
    if parent.is_removed:
        tombstone = read_tombstone(open_store(parent.store_uri), parent.prefix)
        raise CheckpointNotFoundError(removed_message(parent.uri, tombstone) if tombstone else f"{parent.uri} is gone.")
    store = open_store(parent.store_uri)
    return CheckpointStore(store, parent.manifest.run_id).fetch(parent, checkpoint_cache(parent.manifest.run_id))


def find_stage(run: Run, stage: Stage, dataset_id: str, parent: CheckpointRef | None) -> CheckpointRef | None:
    """The stage's committed checkpoint or the variant that took its place; None when it has yet to be trained.

    One that retention removed counts as trained as long as something that came from it is there: `is_removed`.
    Raises RunSettingsChangedError when this run holds a checkpoint of the same stage made with other settings.
    """
    return _find(run, stage, parent, *stage_identity(run, stage, dataset_id, parent))


def check_settings(run: Run, stages: Iterable[Stage]) -> None:
    """Raise RunSettingsChangedError where the run's stages were made with other settings; its data are not looked at.

    Seconds, and before anything starts; the flow looks again, with its data. For a run that does not branch.
    """
    parent, refs = None, run.checkpoints.history()
    for stage in stages:
        data = {ref.manifest.fingerprint_settings.get("dataset_id") for ref in refs if ref.manifest.stage == stage.name}
        refusal, found = None, None
        for dataset_id in filter(None, data):
            try:
                found = found or find_stage(run, stage, dataset_id, parent)
            except RunSettingsChangedError as error:
                refusal = error
        if found is None and refusal is not None:
            raise refusal
        if found is None:
            return
        parent = found


def _find(
    run: Run, stage: Stage, parent: CheckpointRef | None, settings: dict[str, Any], fingerprint: str
) -> CheckpointRef | None:
    """As find_stage; None also while the store cannot be read and the parent has yet to be stored: training goes on."""
    try:
        return _look_up(run, stage, parent, settings, fingerprint)
    except (AccessDeniedError, StoreUnavailableError):
        if run.is_unstored(parent):
            return None
        raise


def _look_up(
    run: Run, stage: Stage, parent: CheckpointRef | None, settings: dict[str, Any], fingerprint: str
) -> CheckpointRef | None:
    refs = run.checkpoints.history()
    present = [ref for ref in refs if not ref.is_removed]
    found = choose_result(fingerprint, present, run.checkpoints.head(missing_ok=True))
    if found is None:
        found = run.checkpoints.find_removed(fingerprint)
    if found is None and run.branches:
        _check_same_origin(run, parent, refs)
    elif found is None:
        for other in refs:
            same_place = other.step == stage.end_step or other.manifest.stage == stage.name
            if same_place and not set_aside(other, parent, refs):
                raise _settings_changed(run, stage, settings, other)
    return found


def stage_identity(run: Run, stage: Stage, dataset_id: str, parent: CheckpointRef | None) -> tuple[dict[str, Any], str]:
    """The stage's settings and their fingerprint."""
    content = None if parent else pretrained_content(run.profile.model)
    settings = fingerprint_settings(run.profile, stage, dataset_id, pretrained_content=content)
    return settings, stage_fingerprint(settings, parent.fingerprint if parent else None)


def pretrained_content(model: ModelConfig) -> str | None:
    """Digest of the files of a local model.pretrained, so that other weights at the same path make another stage.

    None without a local directory: a hub id is told apart by model.revision alone.
    """
    directory = Path(model.pretrained).expanduser() if model.pretrained else None
    if directory is None or not directory.is_dir():
        return None
    files = sorted(path for path in directory.iterdir() if path.suffix in (".json", ".safetensors"))
    return settings_digest({path.name: hash_file(path) for path in files})


def _check_same_origin(run: Run, parent: CheckpointRef | None, refs: Sequence[CheckpointRef]) -> None:
    """A branch from another run starts a run of its own, or continues the one that it started: no other."""
    if parent is None or parent.manifest.run_id == run.run_id or not refs:
        return
    origins = {ref.manifest.parent.fingerprint for ref in refs if ref.manifest.parent}
    if parent.fingerprint not in origins:
        raise RunSettingsChangedError(
            f"Run {run.run_id!r} in {run.store_uri} holds checkpoints, and they did not start from {parent.uri}. "
            "Nothing was changed. Give the branch a run of its own: another --run-id, or none."
        )


def _settings_changed(run: Run, stage: Stage, ours: dict[str, Any], other: CheckpointRef) -> RunSettingsChangedError:
    lines = differing_settings(ours, other.manifest.fingerprint_settings) or ["the checkpoint it started from"]
    lines = [text for line in lines for text in (_dataset_changes(run, other, line) or [line])]
    shown = "\n".join(f"  - {line}" for line in lines)
    return RunSettingsChangedError(
        f"Run {run.run_id!r} already holds stage {other.manifest.stage} made with other settings ({other.uri}).\n"
        f"Differing (there -> now), at stage {stage.name}:\n{shown}\n"
        "Nothing was changed. Give these settings a run of their own with another --run-id, or branch from a "
        f"checkpoint with --resume-from, e.g. --resume-from {run.run_id}@{other.manifest.stage}. "
        f"More cycles for this run: --run-id {run.run_id} --resume-from {run.run_id}@latest --set schedule.cycles=N."
    )


def _dataset_changes(run: Run, other: CheckpointRef, line: str) -> list[str]:
    """In words what two dataset ids differ in; nothing of another line, or where one of the datasets is gone."""
    key, _, ids = line.partition(": ")
    if key != "dataset_id":
        return []
    root, _, place = other.manifest.dataset_uri.rpartition("/datasets/")
    theirs, ours = ids.split(" -> ")
    found = find_dataset(open_store(root), place.split("/")[0], theirs)
    now = find_dataset(run.store, run.profile.data.name, ours)
    return dataset_changes(found, now) if found and now else []


def train_stage(
    run: Run,
    stage: Stage,
    dataset: DatasetRef,
    parent: CheckpointRef | None,
    *,
    on_event: OnEvent,
    provenance: Mapping[str, str],
    variant_of: str | None = None,
    divergence: Mapping[str, Any] | None = None,
) -> StageOutcome:
    """Return the stage's checkpoint, training it first in a process of its own if there is none yet.

    Training goes on from the newest valid snapshot of this very stage, whoever made it; without one, from the parent.
    variant_of, divergence: as in the manifest; see relora_train/runs/divergence.py.
    The checkpoint is committed. Only where the run has a publisher, one that was trained just now may still be on its
    way: durable on this machine, to be stored in its turn. It may be the parent of the next stage at once.
    Safe to repeat and to race: the first commit wins and every other attempt adopts it.
    """
    settings, fingerprint = stage_identity(run, stage, dataset.dataset_id, parent)
    if run.publisher is not None:
        run.publisher.raise_if_superseded()
        if waiting := run.publisher.find(fingerprint):
            return StageOutcome(waiting.checkpoint, reused=False, stored=False)
    if found := _find(run, stage, parent, settings, fingerprint):
        tidy_up(run, found)
        return _reuse(run, found)
    work = WorkDirectory(*work_name(run, stage.name, fingerprint))
    try:
        found = _find(run, stage, parent, settings, fingerprint)  # another process may have held the directory
        if found is not None:
            outcome = _reuse(run, found)
        else:
            begin_work(work.path, stage, parent)
            request = StageRequest(
                run_id=run.run_id,
                profile=run.profile,
                stage=stage,
                fingerprint=fingerprint,
                fingerprint_settings=settings,
                variant_of=variant_of,
                divergence=dict(divergence or {}),
                parent=ParentRef(uri=parent.uri, fingerprint=parent.fingerprint, step=parent.step) if parent else None,
                parent_directory=_files_of(run, parent) if parent else None,
                source_dtype=parent.manifest.source_dtype if parent else None,
                dataset_uri=dataset.uri,
                dataset_id=dataset.dataset_id,
                dataset_directory=fetch_dataset(dataset),
                output_directory=work.path / "checkpoint",
                snapshots_directory=work.path / "snapshots",
                lock_path=work.path / "trainer.lock",
                provenance=dict(provenance),
            )
            outcome = _train_and_store(run, request, parent, work, on_event)
    except BaseException:
        work.release(remove=False)
        raise
    if outcome.stored:
        work.release(remove=True)
    return outcome


def _reuse(run: Run, found: CheckpointRef) -> StageOutcome:
    if not found.is_removed:
        run.checkpoints.set_head(found)
    return StageOutcome(found, reused=True)


def _files_of(run: Run, parent: CheckpointRef) -> Path:
    """A parent's verified files on this machine, also of one that is not stored yet."""
    publication = run.publisher.find(parent.fingerprint) if run.publisher else None
    return fetch_parent(parent) if publication is None else check_local(publication.directory, parent.manifest)


def _train_and_store(
    run: Run, request: StageRequest, parent: CheckpointRef | None, work: WorkDirectory, on_event: OnEvent
) -> StageOutcome:
    snapshots = SnapshotStore(
        run.store, run.run_id, request.fingerprint, work.path / "snapshots", keep=run.profile.snapshots.keep
    )
    output = left_output(request)
    if output is None:
        _run_trainer(run, request, parent, work.path / "request.json", snapshots, on_event)
        output = committed_output(request)
    if output is None:
        raise ObjectNotFoundError(f"The trainer ended well but left no manifest in {request.output_directory}.")
    made = MadeStage(output, work)
    if run.publisher is None:
        return StageOutcome(store_now(run, made), reused=False)
    return StageOutcome(store_later(run, run.publisher, made), reused=False, stored=False)


def _run_trainer(
    run: Run,
    request: StageRequest,
    parent: CheckpointRef | None,
    request_path: Path,
    snapshots: SnapshotStore,
    on_event: OnEvent,
) -> None:
    """Train from the newest valid snapshot, if any, and store the snapshots that are made meanwhile.

    Not before the parent is stored: who finds them there must find what they began from.
    """

    newest = snapshots.newest_valid(local_only=run.is_unstored(parent))
    if newest is not None:
        request = request.model_copy(update={"snapshot_directory": newest.directory})
    with SnapshotUploader(snapshots, may_store=lambda: not run.is_unstored(parent)) as uploader:
        if newest is not None and not newest.stored:
            uploader.offer(newest.directory)
        work = run.worker.run if run.worker is not None else run_worker
        work(
            "relora_train.training.trainer",
            request,
            request_path,
            on_event=uploader.watch(_unless_in_vain(run, on_event)),
            nproc_per_node=request.profile.launch.nproc_per_node,
            nodes=nodes_of(request.profile.launch),
        )


def _unless_in_vain(run: Run, on_event: OnEvent) -> OnEvent:
    """Ends the work, by an exception from its next event, once nothing of it could be committed any more."""

    def on_event_meanwhile(event: Event) -> None:
        if event["event"] == "stopping" and run.publisher is not None:
            run.publisher.stopping()
        run.raise_if_in_vain()
        on_event(event)

    return on_event_meanwhile


def store_trained(run: Run, outcome: StageOutcome) -> StageOutcome:
    """The outcome of a stage once its checkpoint is stored, and its local files are let go of.

    Not before the next stage has been trained: it reads them. Raises what keeps it from being stored; safe to repeat.
    """
    checkpoint = run.wait_until_stored(outcome.checkpoint)
    if run.publisher is not None:
        run.publisher.settle(checkpoint)
    return replace(outcome, checkpoint=checkpoint, stored=True)


def line_of(checkpoint: CheckpointRef | None) -> list[CheckpointRef]:
    """The checkpoints that led to this one, oldest first, itself last, across runs and stores.

    Ends early, without an error, where an ancestor was deleted: every checkpoint is complete without its parents.
    """
    line: list[CheckpointRef] = []
    current = checkpoint
    while current is not None:
        run = CheckpointStore(open_store(current.store_uri), current.manifest.run_id)
        line = [*run.ancestry(current), *line]
        parent = line[0].manifest.parent
        current = (
            _read_if_there(parent.uri) if parent and parent.fingerprint not in {c.fingerprint for c in line} else None
        )
    return line


def line_to_head(run: Run, line: list[CheckpointRef]) -> list[CheckpointRef]:
    """The line and what the run has beyond its end, as after a command that added cycles to it."""
    whole = line_of(run.checkpoints.head(missing_ok=True))
    return whole if line and line[-1] in whole else line


def _read_if_there(uri: str) -> CheckpointRef | None:
    store_uri, prefix = split_checkpoint_uri(uri)
    try:
        return read_checkpoint(open_store(store_uri), prefix)
    except ReLoRAError:
        return None


def first_and_last(line: Sequence[CheckpointRef]) -> list[CheckpointRef]:
    """The checkpoints that are sampled from: the last one before any merge, and the last one."""
    before = [checkpoint for checkpoint in line if checkpoint.manifest.cycle == 0]
    chosen = [before[-1] if before else line[0], line[-1]]
    return chosen[:1] if chosen[0].fingerprint == chosen[1].fingerprint else chosen
