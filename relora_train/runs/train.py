"""Train one stage of a run, from its parent's checkpoint to its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relora_train.checkpoints.fetch import check_local
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import ParentRef
from relora_train.checkpoints.snapshots import SnapshotStore
from relora_train.errors import ObjectNotFoundError
from relora_train.events import Event
from relora_train.method.stages import Stage
from relora_train.runs.find import find_identified, stage_identity
from relora_train.runs.run import DatasetRef, OnEvent, Run, StageOutcome, fetch_dataset, fetch_parent
from relora_train.runs.snapshot_uploader import SnapshotUploader
from relora_train.runs.stage_work import (
    MadeStage,
    begin_work,
    committed_output,
    left_output,
    remove_leftover_work,
    store_later,
    store_now,
    work_name,
)
from relora_train.runs.workers import nodes_of, run_worker
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
    variant_of: str | None = None,
    divergence: Mapping[str, Any] | None = None,
) -> StageOutcome:
    """Return the stage's checkpoint, training it first in a process of its own if there is none yet.

    Safe to repeat and to race: the first commit wins and every other attempt adopts it. Training resumes from the
    newest valid snapshot of this very stage, whoever made it; without one, it begins at the parent.

    Args:
        variant_of, divergence: as in the manifest; see divergence.py

    The checkpoint is committed. Only if the run has a publisher may one that was just trained still be on its way:
    durable on this machine, to be stored in its turn. It may be the parent of the next stage at once.
    """
    settings, fingerprint = stage_identity(run, stage, dataset.dataset_id, parent)
    if run.publisher is not None:
        run.publisher.raise_if_superseded()
        if waiting := run.publisher.find(fingerprint):
            return StageOutcome(waiting.checkpoint, reused=False, stored=False)
    found = find_identified(run, stage, parent, settings, fingerprint)
    if found is not None:
        remove_leftover_work(run, found)
        return _reuse(run, found)
    work = WorkDirectory(*work_name(run, stage.name, fingerprint))
    try:
        if work.waited:  # for another process, which may have trained the stage
            run.checkpoints.refresh()
            found = find_identified(run, stage, parent, settings, fingerprint)
        if found is not None:
            outcome = _reuse(run, found)
        else:
            begin_work(work.path, stage, parent)
            waiting = run.publisher.find(parent.fingerprint) if run.publisher and parent else None
            parent_directory = fetch_parent(parent) if parent and waiting is None else None
            if waiting is not None:  # the parent is not in the store yet
                parent_directory = check_local(waiting.directory, waiting.checkpoint.manifest)
            request = StageRequest(
                run_id=run.run_id,
                profile=run.profile,
                stage=stage,
                fingerprint=fingerprint,
                fingerprint_settings=settings,
                variant_of=variant_of,
                divergence=dict(divergence or {}),
                parent=ParentRef(uri=parent.uri, fingerprint=parent.fingerprint, step=parent.step) if parent else None,
                parent_directory=parent_directory,
                source_dtype=parent.manifest.source_dtype if parent else None,
                dataset_uri=dataset.uri,
                dataset_id=dataset.dataset_id,
                dataset_directory=fetch_dataset(dataset),
                output_directory=work.path / "checkpoint",
                snapshots_directory=work.path / "snapshots",
                lock_path=work.path / "trainer.lock",
                provenance=dict(provenance),
            )
            output = left_output(request)
            if output is None:
                _run_trainer(run, request, parent, work, on_event)
                output = committed_output(request)
            if output is None:
                raise ObjectNotFoundError(f"The trainer ended well but left no manifest in {request.output_directory}.")
            made = MadeStage(output, work)
            if run.publisher is None:
                outcome = StageOutcome(store_now(run, made), reused=False)
            else:
                outcome = StageOutcome(store_later(run, run.publisher, made), reused=False, stored=False)
    except BaseException:
        work.release(remove=False)
        raise
    if outcome.stored:
        work.release(remove=True)
    return outcome


def _reuse(run: Run, found: CheckpointRef) -> StageOutcome:
    if not found.is_pruned:
        run.checkpoints.set_head(found)
    return StageOutcome(found, reused=True)


def _run_trainer(
    run: Run, request: StageRequest, parent: CheckpointRef | None, work: WorkDirectory, on_event: OnEvent
) -> None:
    """Train from the newest valid snapshot, if any, and store the snapshots that are made meanwhile.

    While the parent is not stored, snapshots stay on this machine: a reader in the store could not use them.
    """
    snapshots = SnapshotStore(
        run.store, run.run_id, request.fingerprint, work.path / "snapshots", keep=run.profile.snapshots.keep
    )
    newest = snapshots.newest_valid(local_only=run.is_unstored(parent))
    if newest is not None:
        request = request.model_copy(update={"snapshot_directory": newest.directory})
    with SnapshotUploader(snapshots, may_store=lambda: not run.is_unstored(parent)) as uploader:
        if newest is not None and not newest.stored:
            uploader.offer(newest.directory)

        def listen(event: Event) -> None:
            uploader.hear(event)
            if event["event"] == "stopping" and run.publisher is not None:
                run.publisher.stopping()
            run.raise_if_superseded()  # from here, since an exception of its listener ends a worker in order
            on_event(event)

        run_in_worker = run.worker.run if run.worker is not None else run_worker
        run_in_worker(
            "relora_train.training.trainer",
            request,
            work.path / "request.json",
            on_event=listen,
            nproc_per_node=request.profile.launch.nproc_per_node,
            nodes=nodes_of(request.profile.launch),
        )


def store_trained(run: Run, outcome: StageOutcome) -> StageOutcome:
    """Return the outcome of a stage once its checkpoint is stored, and release its local files.

    Call it after the next stage has been trained, which reads them. Raises what keeps it from being stored; safe to
    repeat.
    """
    checkpoint = run.wait_until_stored(outcome.checkpoint)
    if run.publisher is not None:
        run.publisher.release_files(checkpoint)
    return replace(outcome, checkpoint=checkpoint, stored=True)
