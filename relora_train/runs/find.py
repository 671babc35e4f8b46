"""Find a stage's committed checkpoint, and refuse settings that a run was not made with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from relora_train.checkpoints.lineage import CheckpointRef, is_left_behind, result_for
from relora_train.checkpoints.manifest import find_dataset, hash_file
from relora_train.data.dataset_changes import dataset_changes
from relora_train.devices import dropout_mask_here
from relora_train.errors import AccessDeniedError, RunSettingsChangedError, StoreUnavailableError
from relora_train.method.stages import Stage, fingerprint_settings, stage_fingerprint
from relora_train.runs.run import Run
from relora_train.settings.keys import differing_settings, settings_digest
from relora_train.settings.method import DropoutMask, ModelConfig
from relora_train.storage.opening import open_store


class StageIdentity(NamedTuple):
    """All that a stage's result depends on."""

    settings: dict[str, Any]
    fingerprint: str


def stage_identity(
    run: Run, stage: Stage, dataset_id: str, parent: CheckpointRef | None, *, at_own_rate: StageIdentity | None = None
) -> StageIdentity:
    """Return the stage's settings and their fingerprint. Without a parent this reads a local model.pretrained whole.

    at_own_rate: the identity of the same stage at another learning rate, so that nothing is read.
    """
    if at_own_rate is not None:
        content = at_own_rate.settings.get("model.pretrained_content")
    else:
        content = None if parent else pretrained_content(run.profile.model)
    mask = dropout_mask(run, parent)
    settings = fingerprint_settings(run.profile, stage, dataset_id, pretrained_content=content, dropout_mask=mask)
    return StageIdentity(settings, stage_fingerprint(settings, parent.fingerprint if parent else None))


def dropout_mask(run: Run, parent: CheckpointRef | None) -> DropoutMask:
    """Return the run's kind of dropout mask: as set, or as its stages have recorded; settled here at its beginning.

    All stages of a run keep to one kind, on whatever device they are trained.
    """
    if run.profile.relora.dropout_mask != "auto":
        return run.profile.relora.dropout_mask
    if parent is not None and parent.manifest.dropout_mask is not None:
        return parent.manifest.dropout_mask
    made = [*run.checkpoints.history(), *([parent] if parent else [])]
    if recorded := next((ref.manifest.dropout_mask for ref in made if ref.manifest.dropout_mask), None):
        return recorded
    if any(ref.manifest.cycle for ref in made):  # trained before there was a choice
        return "stream"
    return dropout_mask_here(run.profile)


def pretrained_content(model: ModelConfig) -> str | None:
    """Return a digest of the files of a local model.pretrained, so that other weights there make another stage.

    Without a local directory it is None: model.revision alone tells hub ids apart.
    """
    directory = Path(model.pretrained).expanduser() if model.pretrained else None
    if directory is None or not directory.is_dir():
        return None
    files = sorted(path for path in directory.iterdir() if path.suffix in (".json", ".safetensors"))
    return settings_digest({path.name: hash_file(path) for path in files})


def find_stage(run: Run, stage: Stage, parent: CheckpointRef | None, identity: StageIdentity) -> CheckpointRef | None:
    """Return the stage's committed checkpoint or the variant that took its place, or None if it has yet to be trained.

    A pruned one counts as trained, with `is_pruned`, as long as something that came from it is there.
    While the store cannot be read and the parent has yet to be stored, the answer is None: training goes on.
    Raises RunSettingsChangedError if this run holds a checkpoint of the same stage made with other settings. A branch
    may have other settings; it is refused if the run was begun from another checkpoint than its parent.
    """
    try:
        refs = run.checkpoints.history()
        present = [ref for ref in refs if not ref.is_pruned]
        found = result_for(identity.fingerprint, present, run.checkpoints.head(missing_ok=True))
        if found is None:
            found = run.checkpoints.find_pruned(identity.fingerprint)
    except (AccessDeniedError, StoreUnavailableError):
        if run.is_unstored(parent):
            return None
        raise
    if found is not None:
        return found
    if not run.branches:
        for other in refs:
            same_place = other.step == stage.end_step or other.manifest.stage == stage.name
            if same_place and not is_left_behind(other, parent, refs):
                raise _settings_changed(run, stage, identity.settings, other)
    elif parent is not None and parent.manifest.run_id != run.run_id and refs:
        origins = {ref.manifest.parent.fingerprint for ref in refs if ref.manifest.parent}
        if parent.fingerprint not in origins:
            raise RunSettingsChangedError(
                f"Run {run.run_id!r} in {run.store_uri} holds checkpoints, and they did not start from {parent.uri}. "
                "Nothing was changed. Give the branch a run of its own: another --run-id, or none."
            )
    return None


def check_settings(run: Run, stages: Iterable[Stage]) -> None:
    """Raise RunSettingsChangedError if the run's stages were made with other settings. The data are not compared.

    For a run that does not branch, before anything starts: it takes seconds. The flow looks again, with its data.
    """
    parent, refs = None, run.checkpoints.history()
    for stage in stages:
        data = {ref.manifest.fingerprint_settings.get("dataset_id") for ref in refs if ref.manifest.stage == stage.name}
        refusal, found = None, None
        for dataset_id in filter(None, data):
            try:
                found = found or find_stage(run, stage, parent, stage_identity(run, stage, dataset_id, parent))
            except RunSettingsChangedError as error:
                refusal = error
        if found is None and refusal is not None:
            raise refusal
        if found is None:
            return
        parent = found


def _settings_changed(run: Run, stage: Stage, ours: dict[str, Any], other: CheckpointRef) -> RunSettingsChangedError:
    lines = []
    for line in differing_settings(ours, other.manifest.fingerprint_settings) or ["the checkpoint it started from"]:
        changes: list[str] = []
        if line.startswith("dataset_id: "):  # say how the two differ, if both are still there
            theirs, now = line.removeprefix("dataset_id: ").split(" -> ")
            root, _, place = other.manifest.dataset_uri.rpartition("/datasets/")
            before = find_dataset(open_store(root), place.split("/")[0], theirs)
            after = find_dataset(run.store, run.profile.data.name, now)
            changes = dataset_changes(before, after) if before and after else []
        lines += changes or [line]
    shown = "\n".join(f"  - {line}" for line in lines)
    return RunSettingsChangedError(
        f"Run {run.run_id!r} already holds stage {other.manifest.stage} made with other settings ({other.uri}).\n"
        f"Differing (there -> now), at stage {stage.name}:\n{shown}\n"
        "Nothing was changed. Give these settings a run of their own with another --run-id, or branch from a "
        f"checkpoint with --resume-from, e.g. --resume-from {run.run_id}@{other.manifest.stage}. "
        f"More cycles for this run: --run-id {run.run_id} --resume-from {run.run_id}@latest --set schedule.cycles=N."
    )
