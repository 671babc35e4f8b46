"""Scores of committed checkpoints, kept in the store beside the run so that they are made once."""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import DatasetManifest, read_manifest
from relora_train.devices import sharing_ranks
from relora_train.errors import AccessDeniedError, ObjectNotFoundError
from relora_train.runs.run import DatasetRef, OnEvent, Run, fetch_dataset, fetch_parent
from relora_train.settings.keys import settings_digest
from relora_train.settings.profile import Profile, profile_to_read, unset_later_keys
from relora_train.storage.base import ObjectStore, find_json, parse_json, put_json
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import WorkDirectory, checkpoint_cache, short_digest
from relora_train.training.requests import EvaluationRequest

_log = logging.getLogger("relora_train.runs.evaluations")


@dataclass(frozen=True)
class EvaluationOutcome:
    """checkpoint_uri, stage, step, the scores of the profile's objective, samples; reused or made now."""

    record: dict[str, Any]
    reused: bool


def dataset_of(checkpoint: CheckpointRef) -> DatasetRef:
    """Return the dataset that a checkpoint was trained on. Raise ObjectNotFoundError if it is gone."""
    uri = checkpoint.manifest.dataset_uri
    root, _, rest = uri.rpartition("/datasets/")
    store = open_store(root)
    manifest = read_manifest(store, f"datasets/{rest}", DatasetManifest)
    if manifest is None:
        raise ObjectNotFoundError(
            f"The dataset of {checkpoint.uri} is not at {uri} any more. Prepare it again with the profile of the run, "
            "or copy it back."
        )
    return DatasetRef(store.uri, manifest)


def profile_of(checkpoint: CheckpointRef) -> Profile:
    """Return the resolved settings that a checkpoint was made with."""
    fetch = files_in_stores(checkpoint_cache(checkpoint.manifest.run_id))
    return profile_to_read((fetch(checkpoint, ["profile.json"]) / "profile.json").read_bytes())


def score_checkpoint(checkpoint: CheckpointRef, *, on_event: OnEvent) -> EvaluationOutcome:
    """Score a checkpoint with its own profile on its own dataset; the record goes beside its run, and is reused."""
    run = Run(checkpoint.manifest.run_id, checkpoint.store_uri, profile_of(checkpoint))
    return evaluate_or_reuse(run, checkpoint, dataset_of(checkpoint), on_event=on_event)


def evaluate_or_reuse(
    run: Run, checkpoint: CheckpointRef, dataset: DatasetRef, *, on_event: OnEvent
) -> EvaluationOutcome:
    """Score a checkpoint on the validation split and sample from it, or return what was recorded for the same settings.

    The run gives settings, store and worker. The worker loads the checkpoint with plain `from_pretrained`; if the run
    shares its model between ranks, those of this machine share it here too.
    """
    profile, store = run.profile, run.store
    key = _key(profile, checkpoint, dataset)
    name = f"{checkpoint.manifest.stage}-{checkpoint.fingerprint[:12]}-{short_digest(f'{store.uri}/{key}')}"
    with WorkDirectory(checkpoint.manifest.run_id, f"evaluate-{name}") as work:
        if recorded := recorded_evaluation(profile, checkpoint, dataset, store):  # maybe by one that was waited for
            return EvaluationOutcome(recorded, reused=True)
        request = EvaluationRequest(
            profile=profile,
            checkpoint_directory=fetch_parent(checkpoint),
            dataset_directory=fetch_dataset(dataset),
            result_path=work.path / "result.json",
            sequences=profile.evaluation.final_sequences,
        )
        path, launch = work.path / "request.json", sharing_ranks(profile.launch)
        run.worker.run("relora_train.training.evaluate", request, path, on_event=on_event, launch=launch)
        record = {
            "checkpoint_uri": checkpoint.uri,
            "run_id": checkpoint.manifest.run_id,
            "stage": checkpoint.manifest.stage,
            "step": checkpoint.step,
            "dataset_id": dataset.dataset_id,
            **json.loads(request.result_path.read_text()),
        }
        try:
            put_json(store, key, record)
        except AccessDeniedError as error:  # a store that can only be read still has its checkpoints scored
            _log.warning("These scores are not recorded, so the next evaluation makes them again: %s", error)
    return EvaluationOutcome(record, reused=False)


def recorded_evaluation(
    profile: Profile, checkpoint: CheckpointRef, dataset: DatasetRef, store: ObjectStore
) -> dict[str, Any] | None:
    """Return what evaluate_or_reuse would reuse, or None if it would score."""
    record = find_json(store, _key(profile, checkpoint, dataset))  # a damaged one costs another evaluation
    return None if record is None else {**record, "checkpoint_uri": checkpoint.uri}  # the store may have moved


def recorded_evaluations(store: ObjectStore, line: Sequence[CheckpointRef]) -> list[dict[str, Any]]:
    """Return the newest record of each checkpoint of a line that has one, in the line's order."""
    newest: dict[str, dict[str, Any]] = {}
    for run_id in dict.fromkeys(ref.manifest.run_id for ref in line):
        for info in sorted(store.list(f"runs/{run_id}/evaluations/"), key=lambda info: info.modified_at):
            with suppress(ValueError, KeyError, TypeError):  # one that is damaged is no record
                record = parse_json(store.get_bytes(info.key)[0])
                newest[record["checkpoint_uri"]] = record
    return [newest[ref.uri] for ref in line if ref.uri in newest]


def _key(profile: Profile, checkpoint: CheckpointRef, dataset: DatasetRef) -> str:
    later = {"precision": unset_later_keys(profile, "precision")}  # scores from before them are found again
    settings = profile.model_dump(mode="json", include={"evaluation", "precision", "seed"}, exclude=later)
    settings |= {"sequence_length": profile.batch.sequence_length, "dataset_id": dataset.dataset_id}
    run_id = check_run_id(checkpoint.manifest.run_id)
    place = f"step-{checkpoint.step:08d}-{checkpoint.fingerprint[:12]}-{settings_digest(settings)[:8]}"
    return f"runs/{run_id}/evaluations/{place}.json"
