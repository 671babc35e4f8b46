"""Train one stage of a run again on purpose, to check a result that somebody distrusts.

The stage is trained in full, from its parent, with its own settings and nothing of earlier attempts. Its files are
compared with the committed ones by SHA-256. If the bytes are the same, nothing changes and the checkpoint is confirmed.
If they differ (a GPU without deterministic kernels, another version, damaged hardware), the committed checkpoint stays
the run's, unless `replace` asks for the new one.

A replacement is a variant: committed beside the other, never over it. `retry` among its settings gives it a fingerprint
of its own, and the run's head moves to it. Checkpoints that were trained from the replaced one stay usable by their
URIs, off the run's line; the run's own command trains those stages again.
"""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass

from relora_train.checkpoints.layout import split_checkpoint_uri
from relora_train.checkpoints.lease import hold_run
from relora_train.checkpoints.lineage import CheckpointRef, descendants, read_checkpoint
from relora_train.checkpoints.manifest import RECORD_FILES, CheckpointManifest
from relora_train.checkpoints.names import read_checkpoints
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import CheckpointNotFoundError, ConfigError, ObjectNotFoundError
from relora_train.method.stages import Stage, stage_fingerprint
from relora_train.runs.evaluations import dataset_of, profile_of
from relora_train.runs.find import StageIdentity, stage_identity
from relora_train.runs.run import OnEvent, Run
from relora_train.runs.train import run_trainer, stage_request
from relora_train.settings.keys import differing_settings, settings_digest
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import WorkDirectory

_RETRY = "retry"
_DESCRIPTIONS = ("adapter/README.md", "adapter/adapter_config.json")
"""Beside what was trained; an earlier version wrote them otherwise."""


@dataclass(frozen=True)
class RetryOutcome:
    """The result of a retry."""

    checkpoint: CheckpointRef
    """The one that was committed before."""

    differing_files: tuple[str, ...]
    """Files of the checkpoint with other bytes than before, by name; none when the result is confirmed."""

    evaluation: dict[str, float]
    """The scores of the new attempt; the committed ones are in the manifest."""

    descendants: tuple[CheckpointRef, ...]
    """Checkpoints of this store that were trained from the committed one, in any run."""

    replacement: CheckpointRef | None
    """The new attempt, when it was committed in the other's place."""

    @property
    def identical(self) -> bool:
        return not self.differing_files


def retry_stage(checkpoint: CheckpointRef, *, on_event: OnEvent, replace: bool = False) -> RetryOutcome:
    """Train a committed checkpoint's stage again and compare; see above. Without `replace` the store is only read.

    With it this process is the run's one writer meanwhile: RunInUseError while a flow of the run lives, and ConfigError
    before any work for a checkpoint off its run's line. Raises CheckpointNotFoundError or ObjectNotFoundError when its
    parent or dataset is gone.
    """
    manifest, store = checkpoint.manifest, open_store(checkpoint.store_uri)
    held = CheckpointStore(store, manifest.run_id)
    if replace:
        end = held.latest() if checkpoint.prefix else None
        if end is None or checkpoint.uri not in {ref.uri for ref in held.ancestry(end)}:
            raise ConfigError(
                f"{checkpoint.uri} is not on the line of run {manifest.run_id!r}, so nothing of the run depends on it. "
                "Retry it without --replace, or branch from its parent with --resume-from."
            )
    run = Run(manifest.run_id, checkpoint.store_uri, profile_of(checkpoint))
    parent, dataset, stage = parent_of(checkpoint), dataset_of(checkpoint), stage_of(manifest)
    ours = stage_identity(run, stage, dataset.dataset_id, parent).settings
    theirs = {key: value for key, value in manifest.fingerprint_settings.items() if key != _RETRY}
    if lines := differing_settings(ours, theirs):
        shown = "".join(f"\n  - {line}" for line in lines)
        raise ConfigError(
            f"The settings of {checkpoint.uri} are not what its profile.json means to this version (there -> now):"
            f"{shown}\nRetry it with the version that made it: {manifest.versions.get('relora-train', '?')}."
        )
    writer = hold_run(store, run.run_id, depends_on=[checkpoint.uri]) if replace else nullcontext()
    with writer as lease, WorkDirectory(run.run_id, f"retry-{stage.name}-{checkpoint.fingerprint[:12]}") as work:
        shutil.rmtree(work.path / "checkpoint", ignore_errors=True)  # of a retry that was stopped: it proves nothing
        identity = StageIdentity(manifest.fingerprint_settings, checkpoint.fingerprint)
        variant = {"variant_of": manifest.variant_of, "divergence": manifest.divergence}
        request = stage_request(run, stage, identity, dataset, parent, work.path, **variant)
        made = run_trainer(run, request, work.path, on_event)
        differing, replacement = differing_files(made, manifest), None
        if lease is not None and differing:
            lease.check()
            # The new attempt gets a fingerprint of its own, which follows from its bytes.
            content = {entry.path: entry.sha256 for entry in made.files if entry.path not in RECORD_FILES}
            settings = {**made.fingerprint_settings, _RETRY: settings_digest(content)[:16]}
            update = {
                "fingerprint": stage_fingerprint(settings, made.parent.fingerprint if made.parent else None),
                "fingerprint_settings": settings,
                "variant_of": checkpoint.result_of,
            }
            replacement = held.commit(request.output_directory, made.model_copy(update=update))
            held.set_head(replacement)
    below = descendants(checkpoint, read_checkpoints(store))
    return RetryOutcome(checkpoint, differing, made.evaluation, tuple(below), replacement)


def stage_of(manifest: CheckpointManifest) -> Stage:
    """Return the stage that ended in a checkpoint, from the settings of its fingerprint. Pure."""
    settings = manifest.fingerprint_settings
    kind, start = settings["stage.kind"], settings["stage.start_step"]
    phase_start = settings["schedule.warm_start_steps"] if kind in ("relora", "lora") else 0
    return Stage(
        manifest.stage, kind, start, settings["stage.end_step"], manifest.cycle, phase_step=start - phase_start
    )


def differing_files(ours: CheckpointManifest, theirs: CheckpointManifest) -> tuple[str, ...]:
    """Return files that only one of two checkpoints has, or that have other bytes; records are not compared."""
    one, two = ({entry.path: entry.sha256 for entry in manifest.files} for manifest in (ours, theirs))
    names = {*one, *two} - {*RECORD_FILES, *_DESCRIPTIONS}
    return tuple(sorted(name for name in names if one.get(name) != two.get(name)))


def parent_of(checkpoint: CheckpointRef) -> CheckpointRef | None:
    """Return the checkpoint that a stage began from, or None. Raise CheckpointNotFoundError if it is gone."""
    named = checkpoint.manifest.parent
    if named is None:
        return None
    store_uri, prefix = split_checkpoint_uri(named.uri)
    try:
        parent = read_checkpoint(open_store(store_uri), prefix)
    except ObjectNotFoundError:
        parent = None
    if parent is None or parent.fingerprint != named.fingerprint:
        raise CheckpointNotFoundError(
            f"{checkpoint.uri} was trained from {named.uri}, which is not there any more (pruned, deleted or moved), "
            "and this needs both. Bring it back there, or take another checkpoint."
        )
    return parent
