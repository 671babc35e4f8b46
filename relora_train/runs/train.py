"""Train one stage of a run, from its parent's checkpoint to its own."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from relora_train import events
from relora_train.checkpoints.commit import remove_leftovers
from relora_train.checkpoints.fetch import check_local
from relora_train.checkpoints.layout import snapshots_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointManifest,
    ParentRef,
    parse_manifest,
    result_digest,
)
from relora_train.checkpoints.snapshots import SnapshotStore, remove_snapshots
from relora_train.errors import CheckpointError, ObjectNotFoundError, ReLoRAError
from relora_train.events import Event
from relora_train.method.stages import Stage
from relora_train.runs.background import SnapshotUploader
from relora_train.runs.find import StageIdentity, dropout_mask, find_stage, stage_identity
from relora_train.runs.made_by import made_by
from relora_train.runs.publishing import Publication
from relora_train.runs.run import DatasetRef, OnEvent, Run, StageOutcome, fetch_dataset, fetch_parent
from relora_train.storage.durable import sync_all
from relora_train.storage.workspace import (
    WorkDirectory,
    checkpoint_cache,
    keep_work_from,
    short_digest,
    wait_for_orphan,
)
from relora_train.training.requests import StageRequest

_LOGGER = logging.getLogger(__name__)


def train_stage(
    run: Run,
    stage: Stage,
    dataset: DatasetRef,
    parent: CheckpointRef | None,
    *,
    on_event: OnEvent,
    provenance: Mapping[str, str],
    identity: StageIdentity | None = None,
    **variant: Any,
) -> StageOutcome:
    """Return the stage's checkpoint, training it first in a process of its own if there is none yet.

    Safe to repeat and to race: the first commit wins and every other attempt adopts it. Training resumes from the
    newest valid snapshot of this very stage, whoever made it; without one, it begins at the parent.

    identity: the stage's, if the caller knows it. variant: variant_of and divergence, as in the manifest.

    The checkpoint is committed. Only if the run has a publisher may one that was just trained still be on its way:
    durable on this machine, to be stored in its turn. It may be the parent of the next stage at once.
    """
    identity = identity or stage_identity(run, stage, dataset.dataset_id, parent)
    run.publisher.raise_if_superseded()
    if waiting := run.publisher.find(identity.fingerprint):
        return StageOutcome(waiting.checkpoint, reused=False, stored=False)
    if found := find_stage(run, stage, parent, identity):
        remove_leftover_work(run, found)
        return _reuse(run, found)
    work = WorkDirectory(*work_name(run, stage.name, identity.fingerprint))
    try:
        if work.waited:  # for another process, which may have trained the stage
            run.checkpoints.refresh()
            if found := find_stage(run, stage, parent, identity):
                work.release(remove=True)
                return _reuse(run, found)
        wait_for_orphan(work.path / "trainer.lock")
        # Fingerprints tell settings apart, not bytes: another attempt at the parent may have come to others, and won.
        if parent is not None and not keep_work_from(work.path, result_digest(parent.manifest)):
            _LOGGER.warning(
                "What this machine had of %s began from another result of %s than the run's; it was dropped.",
                stage.name, parent.manifest.stage,
            )  # fmt: skip
        local = {"snapshots_directory": work.path / "snapshots", "lock_path": work.path / "trainer.lock"}
        options = {**local, **variant, "provenance": {**made_by(), **provenance}}
        request = stage_request(run, stage, identity, dataset, parent, work.path, **options)
        return store_output(run, left_output(request) or _train(run, request, parent, work.path, on_event), work)
    except BaseException:
        work.release(remove=False)
        raise


def _reuse(run: Run, found: CheckpointRef) -> StageOutcome:
    if not found.is_pruned:
        run.checkpoints.set_head(found)
    return StageOutcome(found, reused=True)


def stage_request(
    run: Run,
    stage: Stage,
    identity: StageIdentity,
    dataset: DatasetRef,
    parent: CheckpointRef | None,
    work: Path,
    **options: Any,
) -> StageRequest:
    """Return a request to train a stage in a work directory, from verified files of its parent and its dataset.

    options: further fields of the request.
    """
    parent_directory = None
    if parent is not None:
        waiting = run.publisher.find(parent.fingerprint)  # then the parent is not in the store yet
        parent_directory = (
            check_local(waiting.directory, waiting.checkpoint.manifest) if waiting else fetch_parent(parent)
        )
    return StageRequest(
        run_id=run.run_id,
        profile=run.profile,
        stage=stage,
        fingerprint=identity.fingerprint,
        fingerprint_settings=identity.settings,
        parent=ParentRef(uri=parent.uri, fingerprint=parent.fingerprint, step=parent.step) if parent else None,
        parent_directory=parent_directory,
        source_dtype=parent.manifest.source_dtype if parent else None,
        dropout_mask=dropout_mask(run, parent),
        dataset_uri=dataset.uri,
        dataset_id=dataset.dataset_id,
        dataset_directory=fetch_dataset(dataset),
        output_directory=work / "checkpoint",
        **options,
    )


def run_trainer(run: Run, request: StageRequest, work: Path, on_event: OnEvent) -> CheckpointManifest:
    """Run a request's trainer, and return the manifest that it committed on this machine's disk."""
    path, launch = work / "request.json", request.profile.launch
    run.worker.run("relora_train.training.trainer", request, path, on_event=on_event, launch=launch)
    made = read_output(request.output_directory)
    if made is None:
        raise ObjectNotFoundError(f"The trainer ended well but left no manifest in {request.output_directory}.")
    return made


def _train(
    run: Run, request: StageRequest, parent: CheckpointRef | None, work: Path, on_event: OnEvent
) -> CheckpointManifest:
    """Train from the newest valid snapshot, if any, and store the snapshots that are made meanwhile.

    While the parent is not stored, snapshots stay on this machine: a reader in the store could not use them.
    """
    snapshots = SnapshotStore(
        run.store, run.run_id, request.fingerprint, work / "snapshots", keep=run.profile.snapshots.keep
    )
    newest = snapshots.newest_valid(local_only=run.is_unstored(parent))
    if newest is not None:
        request = request.model_copy(update={"snapshot_directory": newest.directory})
    with SnapshotUploader(snapshots, may_store=lambda: not run.is_unstored(parent)) as uploader:
        if newest is not None and not newest.stored:
            uploader.offer(newest.directory)

        def listen(event: Event) -> None:
            uploader.hear(event)
            if event["event"] == "stopping":
                run.publisher.stopping()
            # A successor is noticed here: an exception of its listener ends a worker in order.
            if run.lease is not None:
                run.lease.raise_if_lost()
            run.publisher.raise_if_superseded()
            on_event(event)

        return run_trainer(run, request, work, listen)


def left_output(request: StageRequest) -> CheckpointManifest | None:
    """Return what an earlier attempt committed on this disk and did not store, if it is whole; else None.

    If a power cut damaged it, it is removed, and the stage is finished again from its last snapshot.
    """
    directory = request.output_directory
    try:
        manifest = read_output(directory)
        if manifest is None or manifest.fingerprint != request.fingerprint:
            return None
        check_local(directory, manifest)
    except CheckpointError as error:
        _LOGGER.warning("%s It was left on this machine by an earlier attempt; the stage is finished again.", error)
        (directory / MANIFEST_NAME).unlink()
        shutil.rmtree(directory)
        return None
    return manifest


def read_output(directory: Path) -> CheckpointManifest | None:
    """Return the manifest that a trainer committed in a directory on this disk, or None."""
    path = directory / MANIFEST_NAME
    return parse_manifest(CheckpointManifest, path.read_bytes(), uri=path.as_uri()) if path.is_file() else None


def store_output(run: Run, made: CheckpointManifest, work: WorkDirectory) -> StageOutcome:
    """Commit a trainer's output, or adopt another attempt's, make it the run's head, and release the work directory.

    If the run's publisher has started, hand it over once it is durable on this machine: it is not stored yet.
    """
    directory, later = work.path / "checkpoint", run.publisher.has_started
    if later:
        sync_all(directory)
        shutil.rmtree(work.path / "snapshots", ignore_errors=True)  # those in the store stay until it is stored
    began = time.monotonic()

    def store(still_wanted: Callable[[], None]) -> CheckpointRef:
        def check() -> None:
            still_wanted()
            if run.lease is not None:
                run.lease.check()

        check()
        checkpoint = run.checkpoints.commit(directory, made, check_lease=check)
        check()
        run.checkpoints.set_head(checkpoint)
        _remove_snapshots(run, made.fingerprint)
        if later:
            stage, seconds = checkpoint.manifest.stage, time.monotonic() - began
            events.emit("checkpoint_stored", stage=stage, step=checkpoint.step, uri=checkpoint.uri, seconds=seconds)
        return checkpoint

    def finish(committed: CheckpointRef | None) -> None:
        if committed is not None:  # its files in the cache spare the next reader on this machine a download
            run.checkpoints.keep(committed, made, directory, checkpoint_cache(run.run_id))
        work.release(remove=committed is not None)

    if later:
        checkpoint = run.checkpoints.place_of(made)
        run.publisher.offer(Publication(checkpoint, directory, store, run.store.cancel_uploads, finish))
    else:
        checkpoint = store(lambda: None)
        finish(checkpoint)
    return StageOutcome(checkpoint, reused=False, stored=not later)


def store_trained(run: Run, outcome: StageOutcome) -> StageOutcome:
    """Return the outcome of a stage once its checkpoint is stored, and release its local files.

    Call it after the next stage has been trained, which reads them. Raises what keeps it from being stored; safe to
    repeat.
    """
    checkpoint = run.publisher.wait(outcome.checkpoint)
    run.publisher.release_files(checkpoint)
    return replace(outcome, checkpoint=checkpoint, stored=True)


def remove_leftover_work(run: Run, checkpoint: CheckpointRef) -> None:
    """Remove what a flow left that was killed after it had stored a checkpoint.

    Its files on this machine are cached for the next reader, which spares a download. Best effort.
    """
    _remove_snapshots(run, checkpoint.fingerprint)
    if not checkpoint.is_pruned:
        remove_leftovers(run.store, checkpoint.prefix, checkpoint.manifest)
    work = WorkDirectory.left_over(*work_name(run, checkpoint.manifest.stage, checkpoint.fingerprint))
    if work is None:
        return
    try:
        left = read_output(work.path / "checkpoint")
        if left is not None and left.fingerprint == checkpoint.fingerprint and not checkpoint.is_pruned:
            run.checkpoints.keep(checkpoint, left, work.path / "checkpoint", checkpoint_cache(run.run_id))
    except CheckpointError as error:
        _LOGGER.debug("What was left in %s is of no use: %s", work.path, error)
    work.release(remove=True)


def _remove_snapshots(run: Run, fingerprint: str) -> None:
    """Remove the stage's snapshots from the store: its checkpoint has taken their place. Best effort."""
    try:
        remove_snapshots(run.store, snapshots_prefix(run.run_id, fingerprint))
    except ReLoRAError as error:
        _LOGGER.warning("Snapshots that are no longer needed stay in %s: %s", run.store.uri, error)


def work_name(run: Run, stage: str, fingerprint: str) -> tuple[str, str]:
    """Return the names of the work directory of a stage, or of the variant in its place."""
    return run.run_id, f"{stage}-{fingerprint[:12]}-{short_digest(run.store.uri)}"
