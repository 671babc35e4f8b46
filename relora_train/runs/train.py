"""Train one stage of a run, from its parent's checkpoint to its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from relora_train.checkpoints.fetch import check_local
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import CheckpointManifest, ParentRef
from relora_train.checkpoints.snapshots import SnapshotStore
from relora_train.errors import ObjectNotFoundError
from relora_train.events import Event
from relora_train.method.stages import Stage
from relora_train.runs.background import SnapshotUploader
from relora_train.runs.find import StageIdentity, dropout_mask, find_stage, stage_identity
from relora_train.runs.run import DatasetRef, OnEvent, Run, StageOutcome, fetch_dataset, fetch_parent
from relora_train.runs.stage_work import (
    begin_work,
    left_output,
    read_output,
    remove_leftover_work,
    store_output,
    work_name,
)
from relora_train.storage.workspace import WorkDirectory
from relora_train.training.requests import StageRequest


def train_stage(
    run: Run,
    stage: Stage,
    dataset: DatasetRef,
    parent: CheckpointRef | None,
    *,
    on_event: OnEvent,
    provenance: Mapping[str, str],
    identity: StageIdentity | None = None,
    variant_of: str | None = None,
    divergence: Mapping[str, Any] | None = None,
) -> StageOutcome:
    """Return the stage's checkpoint, training it first in a process of its own if there is none yet.

    Safe to repeat and to race: the first commit wins and every other attempt adopts it. Training resumes from the
    newest valid snapshot of this very stage, whoever made it; without one, it begins at the parent.

    Args:
        identity: the stage's, if the caller knows it
        variant_of, divergence: as in the manifest; see divergence.py

    The checkpoint is committed. Only if the run has a publisher may one that was just trained still be on its way:
    durable on this machine, to be stored in its turn. It may be the parent of the next stage at once.
    """
    identity = identity or stage_identity(run, stage, dataset.dataset_id, parent)
    run.publisher.raise_if_superseded()
    if waiting := run.publisher.find(identity.fingerprint):
        return StageOutcome(waiting.checkpoint, reused=False, stored=False)
    found = find_stage(run, stage, parent, identity)
    if found is not None:
        remove_leftover_work(run, found)
        return _reuse(run, found)
    work = WorkDirectory(*work_name(run, stage.name, identity.fingerprint))
    try:
        if work.waited:  # for another process, which may have trained the stage
            run.checkpoints.refresh()
            found = find_stage(run, stage, parent, identity)
        if found is not None:
            outcome = _reuse(run, found)
        else:
            begin_work(work.path, stage, parent)
            request = stage_request(
                run,
                stage,
                identity,
                dataset,
                parent,
                work.path,
                variant_of=variant_of,
                divergence=dict(divergence or {}),
                snapshots_directory=work.path / "snapshots",
                lock_path=work.path / "trainer.lock",
                provenance=dict(provenance),
            )
            made = left_output(request) or _train(run, request, parent, work.path, on_event)
            outcome = store_output(run, made, work)
    except BaseException:
        work.release(remove=False)
        raise
    if outcome.stored:
        work.release(remove=True)
    return outcome


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


def _reuse(run: Run, found: CheckpointRef) -> StageOutcome:
    if not found.is_pruned:
        run.checkpoints.set_head(found)
    return StageOutcome(found, reused=True)


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
            run.raise_if_superseded()  # from here, since an exception of its listener ends a worker in order
            on_event(event)

        return run_trainer(run, request, work, listen)


def store_trained(run: Run, outcome: StageOutcome) -> StageOutcome:
    """Return the outcome of a stage once its checkpoint is stored, and release its local files.

    Call it after the next stage has been trained, which reads them. Raises what keeps it from being stored; safe to
    repeat.
    """
    checkpoint = run.publisher.wait(outcome.checkpoint)
    run.publisher.release_files(checkpoint)
    return replace(outcome, checkpoint=checkpoint, stored=True)
