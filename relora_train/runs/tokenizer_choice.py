"""The tokenizer that cuts a run's text, and BOS before documents: as the model knows them, unless told otherwise.

Embeddings belong to ids, so a model that exists keeps its tokenizer: a checkpoint's, or that of model.pretrained.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.data.selection import DatasetInputs, Selection, contents_of, inputs_of
from relora_train.data.sources import Source, resolve_source
from relora_train.data.tokenizer import differing_ids, load_tokenizer
from relora_train.data.tokenizer_files import TOKENIZER_FILE, TOKENIZER_FILES
from relora_train.errors import ObjectNotFoundError, RunSettingsChangedError, TokenizerError
from relora_train.runs.evaluations import dataset_of
from relora_train.runs.run import Run
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.profile import Profile
from relora_train.storage.workspace import checkpoint_cache
from relora_train.training.models.registry import facts_of

_log = logging.getLogger("relora_train.runs.tokenizer_choice")


@dataclass(frozen=True)
class TextSettings:
    """The two sections of a profile that a dataset of text is made by."""

    data: DataConfig
    tokenizer: TokenizerConfig

    def inputs(self, source: Source) -> DatasetInputs:
        return inputs_of(replace(source, data=self.data), self.tokenizer, Selection(new=contents_of(source)))


def choose_tokenizer(run: Run, parent: CheckpointRef | None) -> tuple[TextSettings, str]:
    """Return the settings by which a run's text becomes a dataset, and the dataset's id.

    A run that goes on from a checkpoint keeps its dataset, or on other text its tokenizer and BOS, unless the profile
    names others. Other ids than the model's are warned of. Raises RunSettingsChangedError where the run has begun with
    another choice than its settings mean today, and the errors of the source and its tokenizer.
    """
    source, profile = resolve_source(run.profile.data), run.profile
    choices = _choices(profile)
    chosen = choices[0]
    ids = {choice: _id_of(choice, source) for choice in (choices if parent else choices[1:])}
    if parent is not None:
        ids = {choice: one for choice, one in ids.items() if _leaves_open(profile, choice)}
        same = {one: choice for choice, one in reversed(ids.items())}
        chosen = same.get(parent.manifest.dataset_id) or as_checkpoint(parent, profile)
    inputs = chosen.inputs(source)
    _refuse_another_choice(run, inputs.dataset_id, ids)
    if parent is None or parent.manifest.dataset_id != inputs.dataset_id:
        _warn_of_other_ids(profile, parent, inputs)
    return chosen, inputs.dataset_id


def as_checkpoint(checkpoint: CheckpointRef, profile: Profile, *, always: bool = False) -> TextSettings:
    """Return a profile's settings with a checkpoint's tokenizer and BOS where they leave them open, or `always`."""
    data, settings = profile.data, profile.tokenizer
    if always or _is_open(settings):
        path = {"path": str(tokenizer_directory(checkpoint)), "revision": None, "train": False}
        settings = settings.model_copy(update=path)
    if always or (data.bos == "auto" and _is_of(settings, checkpoint)):
        with suppress(ObjectNotFoundError):  # its dataset was deleted: then as the tokenizer does
            data = data.model_copy(update={"bos": bool(dataset_of(checkpoint).manifest.bos_ids)})
    return TextSettings(data, settings)


def tokenizer_directory(checkpoint: CheckpointRef) -> Path:
    """Return a local directory with a checkpoint's tokenizer. Raises CheckpointIncompleteError where it has none."""
    fetch = files_in_stores(checkpoint_cache(checkpoint.manifest.run_id))
    there = [entry.path for entry in checkpoint.manifest.files if entry.path in TOKENIZER_FILES]
    return fetch(checkpoint, [TOKENIZER_FILE, *there])


def _is_open(settings: TokenizerConfig) -> bool:
    """Return True if a profile names no tokenizer and asks for none."""
    return settings.path is None and not settings.train


def _is_of(settings: TokenizerConfig, checkpoint: CheckpointRef) -> bool:
    """Return True if the settings load the tokenizer of a checkpoint."""
    if settings.path is None:
        return False
    loaded = load_tokenizer(settings.path, eos_token=settings.eos_token, revision=settings.revision, bos=False)
    return any(e.path == TOKENIZER_FILE and e.sha256 == loaded.sha256 for e in checkpoint.manifest.files)


def _leaves_open(profile: Profile, choice: TextSettings) -> bool:
    """Return True if a choice differs from a profile only in what the profile leaves open."""
    other_tokenizer = choice.tokenizer != facts_of(profile).tokenizer()
    other_bos = choice.data.bos != profile.data.bos
    return (_is_open(profile.tokenizer) or not other_tokenizer) and (profile.data.bos == "auto" or not other_bos)


def _choices(profile: Profile) -> list[TextSettings]:
    """Return what the settings mean, then what else the same run may have been made by, also by an earlier version."""
    settings, bos = profile.tokenizer, profile.data.bos
    tokenizers = [facts_of(profile).tokenizer()]
    if settings.path is None and profile.model.pretrained is not None:
        other = profile.model_copy(update={"tokenizer": settings.model_copy(update={"train": not settings.train})})
        tokenizers.append(facts_of(other).tokenizer())
    orders = [bos] if bos is True else [bos, False if bos == "auto" else "auto"]
    data = [profile.data.model_copy(update={"bos": order}) for order in orders]
    return [TextSettings(one, tokenizer) for tokenizer, one in itertools.product(tokenizers, data)]


def _id_of(choice: TextSettings, source: Source) -> str | None:
    try:
        return choice.inputs(source).dataset_id
    except TokenizerError:
        return None


def _refuse_another_choice(run: Run, dataset_id: str, others: dict[TextSettings, str | None]) -> None:
    made = {ref.manifest.dataset_id for ref in run.checkpoints.history()}
    if not made or dataset_id in made:
        return
    for choice, other_id in others.items():
        then = _named(choice, run.profile)
        if other_id in made and then:
            raise RunSettingsChangedError(
                f"Run {run.run_id!r} in {run.store_uri} was made with {' and '.join(then)}; these settings now give "
                f"another dataset. Nothing was changed. Go on with --set {' --set '.join(then)} (or the same in the "
                "profile), or give these settings a run of their own with another --run-id."
            )


def _named(choice: TextSettings, profile: Profile) -> list[str]:
    """Return the settings of a choice that differ from a profile's, as --set takes them."""
    lines = []
    if profile.tokenizer.path is None and profile.tokenizer.train != (trained := choice.tokenizer.path is None):
        lines.append(f"tokenizer.train={str(trained).lower()}")
    if choice.data.bos != profile.data.bos:
        lines.append(f"data.bos={str(choice.data.bos).lower()}")
    return lines


def _warn_of_other_ids(profile: Profile, parent: CheckpointRef | None, inputs: DatasetInputs) -> None:
    try:
        found = _differing_from_own(profile, parent, inputs)
    except TokenizerError as error:
        _log.warning("The tokenizer's ids could not be compared with the model's own: %s", error)
        return
    if found:
        whose, difference = found
        _log.warning(
            "ANOTHER TOKENIZER THAN THE MODEL'S: the embeddings of %s were learned for other ids (%s). "
            "Leave tokenizer.path and tokenizer.train out to use its own.", whose, difference
        )  # fmt: skip


def _differing_from_own(
    profile: Profile, parent: CheckpointRef | None, inputs: DatasetInputs
) -> tuple[str, str] | None:
    """Return the model with other ids than a dataset's, and how they differ; None if they are equal or not known."""
    own: Callable[[], tuple[str, str | None]]
    if parent is not None and any(entry.path == TOKENIZER_FILE for entry in parent.manifest.files):
        whose, own = parent.uri, lambda: (str(tokenizer_directory(parent)), None)
    elif parent is None and profile.model.pretrained is not None:
        pretrained = profile.model.pretrained
        whose, own = f"model.pretrained {pretrained!r}", lambda: (pretrained, profile.model.revision)
    else:
        return None
    if inputs.loaded is None:
        return whose, "they are those of a tokenizer trained on this text"
    difference = differing_ids(*own(), inputs.loaded)
    return None if difference is None else (whose, difference)
