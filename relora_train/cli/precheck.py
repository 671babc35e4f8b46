"""Checks that run before any work starts: paths, tokenizer and model. They take seconds and need no network.

Everything here is checked again where it matters; this only spares the wait. Imports no Prefect, and torch only to be
asked for a GPU that the profile wants.
"""

from __future__ import annotations

from pathlib import Path

from relora_train.runs.model_check import check_settings
from relora_train.settings.profile import Profile
from relora_train.training.models.registry import facts_of


def check_inputs(profile: Profile, *, resumed: bool = False) -> str | None:
    """Refuse sources, tokenizers and models on this machine that cannot work; return the dataset's id if it is known.

    None for sources that lie on a hub or in a store: asking them takes time that belongs to the run.
    resumed: the run starts from a checkpoint, so that the profile's own model is not loaded.
    Raises SourceUnreadableError, TokenizerError, DeviceError, and what check_settings does.
    """
    from relora_train.data.prepare import describe_dataset
    from relora_train.devices import check_devices

    check_devices(profile.launch)
    if not resumed:
        check_settings(profile)
    paths = (*profile.data.paths, *profile.data.validation_paths)
    if profile.data.source == "hub" or any("://" in path for path in paths):
        return None
    tokenizer = profile.tokenizer if resumed else facts_of(profile).tokenizer()  # a checkpoint brings its own
    if tokenizer.path and not Path(tokenizer.path).expanduser().exists():
        return None  # perhaps on a hub
    dataset_id, _ = describe_dataset(profile.data, tokenizer)
    return None if resumed else dataset_id
