"""One stage on one machine: its work directory, the trainer's output there, and the way of that into the store."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from relora_train import events
from relora_train.checkpoints.commit import remove_leftovers
from relora_train.checkpoints.fetch import check_local
from relora_train.checkpoints.layout import snapshots_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import MANIFEST_NAME, CheckpointManifest, parse_manifest, result_digest
from relora_train.checkpoints.snapshots import remove_snapshots
from relora_train.errors import CheckpointError, ReLoRAError
from relora_train.method.stages import Stage
from relora_train.runs.publishing import Publication
from relora_train.runs.run import Run, StageOutcome
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


def work_name(run: Run, stage: str, fingerprint: str) -> tuple[str, str]:
    """Return the names of the work directory of a stage, or of the variant in its place."""
    return run.run_id, f"{stage}-{fingerprint[:12]}-{short_digest(run.store.uri)}"


def begin_work(directory: Path, stage: Stage, parent: CheckpointRef | None) -> None:
    """Remove from a stage's work directory what did not begin from these very bytes of its parent.

    Fingerprints tell settings apart, not bytes: another attempt at the parent may have come to other bytes, and won.
    """
    wait_for_orphan(directory / "trainer.lock")
    if parent is not None and not keep_work_from(directory, result_digest(parent.manifest)):
        _LOGGER.warning(
            "What this machine had of %s began from another result of %s than the run's; it was dropped.",
            stage.name, parent.manifest.stage,
        )  # fmt: skip


def read_output(directory: Path) -> CheckpointManifest | None:
    """Return the manifest that a trainer committed in a directory on this disk, or None."""
    path = directory / MANIFEST_NAME
    return parse_manifest(CheckpointManifest, path.read_bytes(), uri=path.as_uri()) if path.is_file() else None


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


def store_output(run: Run, made: CheckpointManifest, work: WorkDirectory) -> StageOutcome:
    """Commit a trainer's output, or adopt another attempt's, make it the run's head, and release the work directory.

    If the run's publisher has started, hand it over once it is durable on this machine: it is not stored yet.
    """
    directory = work.path / "checkpoint"

    def store(still_wanted: Callable[[], None]) -> CheckpointRef:
        def check() -> None:
            still_wanted()
            run.check_lease()

        check()
        checkpoint = run.checkpoints.commit(directory, made, check_lease=check)
        check()
        run.checkpoints.set_head(checkpoint)
        _remove_snapshots(run, made.fingerprint)
        return checkpoint

    def finish(committed: CheckpointRef | None) -> None:
        if committed is not None:  # its files in the cache spare the next reader on this machine a download
            run.checkpoints.keep(committed, made, directory, checkpoint_cache(run.run_id))
        work.release(remove=committed is not None)

    if not run.publisher.has_started:
        checkpoint = store(lambda: None)
        finish(checkpoint)
        return StageOutcome(checkpoint, reused=False)
    sync_all(directory)
    shutil.rmtree(work.path / "snapshots", ignore_errors=True)  # those in the store stay until it is stored
    handed_over = time.monotonic()

    def store_and_tell(still_wanted: Callable[[], None]) -> CheckpointRef:
        checkpoint = store(still_wanted)
        seconds, stage = time.monotonic() - handed_over, checkpoint.manifest.stage
        events.emit("checkpoint_stored", stage=stage, step=checkpoint.step, uri=checkpoint.uri, seconds=seconds)
        return checkpoint

    checkpoint = run.checkpoints.place_of(made)
    run.publisher.offer(Publication(checkpoint, directory, store_and_tell, run.store.cancel_uploads, finish))
    return StageOutcome(checkpoint, reused=False, stored=False)


def _remove_snapshots(run: Run, fingerprint: str) -> None:
    """Remove the stage's snapshots from the store: its checkpoint has taken their place. Best effort."""
    try:
        remove_snapshots(run.store, snapshots_prefix(run.run_id, fingerprint))
    except ReLoRAError as error:
        _LOGGER.warning("Snapshots that are no longer needed stay in %s: %s", run.store.uri, error)
