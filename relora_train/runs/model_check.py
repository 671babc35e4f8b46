"""Check, before anything is tokenized, that a run's model can be loaded, wrapped and put on a device.

This module checks all that needs no torch. A worker process finds out the rest by loading the model.
"""

import json
from collections.abc import Callable, Sequence

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.method.stages import Stage
from relora_train.runs.run import OnEvent, Run
from relora_train.settings.profile import Profile
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import WorkDirectory, short_digest
from relora_train.training.models.registry import facts_of, model_shape
from relora_train.training.models.shape import ModelShape, ShapeUnknownError, wrapped_layers
from relora_train.training.models.shape_of_config import shape_of_config
from relora_train.training.requests import ModelCheckRequest


def check_settings(profile: Profile) -> bool:
    """Refuse a profile whose own model cannot be trained; return True if nothing about it is left to be found out.

    Raises ModelNotFoundError, ModelUnsuitableError, VocabularyMismatchError, NoTargetModulesError, ConfigError.
    """
    facts_of(profile).check_pretrained()
    if profile.method == "full" and not profile.optimizer.projects:
        return profile.model.pretrained is None
    if profile.model.pretrained is None:  # its layers are the same whatever the tokenizer, which may lie on a hub
        profile = profile.model_copy(update={"model": profile.model.model_copy(update={"vocab_size": 2})})
    return _knows_layers(profile, lambda: model_shape(profile)) and profile.model.pretrained is None


def check_run(run: Run, stages: Sequence[Stage], parent: CheckpointRef | None, *, on_event: OnEvent) -> None:
    """Refuse a run whose stages would fail for its model, its targets, its ranks or its devices.

    stages: all that the run is planned to have from its parent. A model that a stage of the run was trained from is not
    loaded once more. Raises what check_settings does, and DeviceError.
    """
    profile, launch = run.profile, run.profile.launch
    low_rank = any(stage.low_rank for stage in stages)
    config: bytes | None = None
    if parent is None:
        known = check_settings(profile) or bool(run.checkpoints.history())
    elif known := not low_rank or parent.is_pruned:
        pass
    else:
        config, _ = open_store(parent.store_uri).get_bytes(f"{parent.prefix}/config.json")
        content, uri = json.loads(config), parent.uri
        known = _knows_layers(profile, lambda: shape_of_config(content, uri))
    asks_for_devices = launch.device == "cuda" or (launch.device == "auto" and launch.nproc_per_node != 1)
    if known and not asks_for_devices:
        return
    with WorkDirectory("checks", f"{run.run_id}-{short_digest(run.store.uri)}") as work:
        directory, path = work.path if config else None, work.path / "request.json"
        if config is not None:
            (work.path / "config.json").write_bytes(config)
        request = ModelCheckRequest(profile=profile, low_rank=low_rank, config_directory=directory)
        run.worker.run("relora_train.training.model_check_worker", request, path, on_event=on_event)


def _knows_layers(profile: Profile, shape: Callable[[], ModelShape]) -> bool:
    """Check the layers that would be wrapped; return False if their shapes are not known without torch."""
    try:
        if profile.optimizer.projects:  # as training/optimizer.py chooses
            rank, setting = profile.optimizer.subspace_rank, "optimizer.subspace_rank"
            wrapped_layers(shape(), target_modules=None, rank=rank, setting=setting)
        else:
            wrapped_layers(shape(), target_modules=profile.relora.target_modules, rank=profile.relora.rank)
    except ShapeUnknownError:
        return False
    return True
