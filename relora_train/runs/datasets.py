"""The committed dataset of a profile: found by content in the store, or prepared in a process and put there.

The tokenizer that cuts a run's text, and BOS before documents, are as the model knows them, unless told otherwise.
Embeddings belong to ids, so a model that exists keeps its tokenizer: a checkpoint's, or that of model.pretrained.
"""

import itertools
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.fetch import files_in_stores, keep_fetched
from relora_train.checkpoints.layout import dataset_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import DatasetManifest, describe_files, find_dataset
from relora_train.checkpoints.upkeep.datasets import check_not_deleting
from relora_train.data.images import IMAGE_SOURCES
from relora_train.data.interleaving import epochs_by_source
from relora_train.data.left_out import left_out_note
from relora_train.data.mixture import (
    MixedTokenizerRequest,
    MixtureInputs,
    inputs_of_sources,
    mixture_manifest,
    resolve_sources,
)
from relora_train.data.prepare import PreparedDataset, PrepareRequest, describe_dataset, home_name
from relora_train.data.remote_shards import MapRanges, encode_remotely
from relora_train.data.selection import DatasetInputs, Selection
from relora_train.data.sources import Source
from relora_train.data.tokenizer import differing_ids, load_tokenizer
from relora_train.data.tokenizer_files import TOKENIZER_FILE, TOKENIZER_FILES
from relora_train.errors import ConfigError, ObjectNotFoundError, RunSettingsChangedError, TokenizerError
from relora_train.runs.evaluations import dataset_of
from relora_train.runs.run import DatasetRef, OnEvent, Run, fetch_dataset, parts_of
from relora_train.runs.workers import run_worker
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.profile import Profile
from relora_train.storage.workspace import WorkDirectory, checkpoint_cache, dataset_cache, short_digest
from relora_train.training.models.registry import facts_of

_log = logging.getLogger("relora_train.runs.datasets")

MOST_USEFUL_EPOCHS = 4
"""Readings of a text beyond which another is worth clearly less than new text: arXiv 2305.16264."""


@dataclass(frozen=True)
class DatasetOutcome:
    """A dataset, and whether it was there already."""

    dataset: DatasetRef
    reused: bool


@dataclass(frozen=True)
class TextSettings:
    """The two sections of a profile that a dataset is made by."""

    data: DataConfig
    tokenizer: TokenizerConfig
    selection: Selection | None = None
    """The parts of the source to take; all of them when absent."""

    def inputs(self, sources: Sequence[Source]) -> DatasetInputs | MixtureInputs:
        return inputs_of_sources(self.data, self.tokenizer, sources)


def prepare_or_reuse(
    run: Run,
    *,
    on_event: OnEvent,
    parent: CheckpointRef | None = None,
    text: TextSettings | None = None,
    map_ranges: MapRanges | None = None,
) -> DatasetOutcome:
    """Return the committed dataset of the run's corpus and tokenizer, tokenizing only what no attempt has yet.

    parent: the checkpoint that the run goes on from; see choose_tokenizer. text: what is not simply as the profile has.
    map_ranges: encodes text on other machines, for a store that they reach; see remote_shards.py.
    Safe to repeat and to race: the first commit wins, and what a killed attempt finished on this machine is used.
    """
    store, name = run.store, (text.data if text else run.profile.data).name
    if text is None and run.profile.data.source not in IMAGE_SOURCES:
        text, dataset_id = choose_tokenizer(run, parent)
    else:
        text = text or TextSettings(run.profile.data, run.profile.tokenizer)
        dataset_id, _ = describe_dataset(text.data, text.tokenizer, selection=text.selection)
    with WorkDirectory("datasets", f"{name}-{dataset_id[:16]}-{short_digest(store.uri)}") as work:
        check_not_deleting(store, dataset_prefix(name, dataset_id))
        found = find_dataset(store, name, dataset_id)  # maybe made by a process that was waited for
        if found is not None and all(parts_of(DatasetRef(store.uri, found)).values()):
            _tell_epochs(run.profile, found)
            return DatasetOutcome(DatasetRef(store.uri, found), reused=True)
        if text.data.sources:
            mixed = _prepare_mixture(run, text, dataset_id, work.path, on_event, map_ranges)
            return DatasetOutcome(mixed, reused=False)
        request = PrepareRequest(
            data=text.data,
            tokenizer=text.tokenizer,
            selection=text.selection,
            work_directory=work.path,
            result_path=work.path / "result.json",
        )
        run.worker.start(run.profile)  # it gets ready meanwhile
        path = work.path / "request.json"  # the source may lie in a store or on a hub: this worker keeps credentials
        if map_ranges is not None and text.data.source not in IMAGE_SOURCES:
            if not store.is_remote:
                raise ConfigError(
                    f"data.dask encodes through the store, and {store.uri} is a directory of this machine, which "
                    "workers elsewhere do not see. Give a store at s3://bucket/prefix, or leave data.dask out."
                )
            staging = request.model_copy(update={"stage_only": True})
            run_worker("relora_train.data.prepare", staging, path, on_event=on_event, keep_secrets=True)
            home = work.path / home_name(name, dataset_id)
            encode_remotely(
                store, home, map_ranges, lambda progress: on_event({"event": "tokenize_progress", **progress})
            )
        run_worker("relora_train.data.prepare", request, path, on_event=on_event, keep_secrets=True)
        prepared = PreparedDataset.model_validate_json(request.result_path.read_bytes())
        statistics = prepared.manifest.statistics
        for note in (statistics.get("split_note"), left_out_note(statistics.get("left_out", ()))):
            if note:
                _log.warning("Dataset %r: %s.", name, note)
        prefix = dataset_prefix(prepared.manifest.name, prepared.manifest.dataset_id)
        manifest = commit_bundle(store, prefix, prepared.directory, prepared.manifest)
        keep_fetched(store, prepared.manifest, manifest, prepared.directory, dataset_cache(manifest.dataset_id))
    return DatasetOutcome(DatasetRef(store.uri, manifest), reused=False)


def _prepare_mixture(
    run: Run, text: TextSettings, dataset_id: str, work: Path, on_event: OnEvent, map_ranges: MapRanges | None
) -> DatasetRef:
    """Prepare each source's dataset or find it, train a tokenizer for all if need be, and commit their mixture."""
    data, settings = text.data, text.tokenizer
    if settings.path is None:
        trained = work / "tokenizer"
        if not (trained / TOKENIZER_FILE).is_file():
            request = MixedTokenizerRequest(data=data, tokenizer=settings, directory=trained)
            path = work / "tokenizer-request.json"
            run_worker("relora_train.data.mixture", request, path, on_event=on_event, keep_secrets=True)
        settings = settings.model_copy(update={"path": str(trained), "train": False})
    parts = [
        prepare_or_reuse(run, on_event=on_event, text=TextSettings(part, settings), map_ranges=map_ranges).dataset
        for part in data.parts()
    ]
    directory = work / "mixture"
    directory.mkdir(exist_ok=True)
    conversations = [part for part in parts if part.manifest.examples and part.manifest.examples.kind == "messages"]
    tokenizer = fetch_dataset((conversations or parts)[0])  # theirs has the chat template that they were made by
    for name in (name for name in TOKENIZER_FILES if (tokenizer / name).is_file()):
        shutil.copyfile(tokenizer / name, directory / name)
    hashed = text.inputs(resolve_sources(data)).hashed()
    mixed = mixture_manifest(data, dataset_id, hashed, [part.manifest for part in parts], describe_files(directory))
    manifest = commit_bundle(run.store, dataset_prefix(data.name, dataset_id), directory, mixed)
    _tell_epochs(run.profile, manifest)
    return DatasetRef(run.store.uri, manifest)


def _tell_epochs(profile: Profile, manifest: DatasetManifest) -> None:
    """Say how often training reads each source, and warn of one that it reads too often."""
    if not manifest.mixture:
        return
    examples = profile.schedule.total_steps * profile.batch.sequences
    for name, (tokens, epochs) in epochs_by_source(manifest, examples, profile.batch.sequence_length).items():
        say = _log.warning if epochs > MOST_USEFUL_EPOCHS else _log.info
        say("Source %r gives %s tokens of training: it is read %.2g times.%s", name, f"{tokens:,}", epochs,
            f" Above {MOST_USEFUL_EPOCHS}, more text or a smaller weight serves better."
            if epochs > MOST_USEFUL_EPOCHS else "")  # fmt: skip


def choose_tokenizer(run: Run, parent: CheckpointRef | None) -> tuple[TextSettings, str]:
    """Return the settings by which a run's text becomes a dataset, and the dataset's id.

    A run that goes on from a checkpoint keeps its dataset, or on other text its tokenizer and BOS, unless the profile
    names others. Other ids than the model's are warned of. Raises RunSettingsChangedError where the run has begun with
    another choice than its settings mean today, and the errors of the source and its tokenizer.
    """
    sources, profile = resolve_sources(run.profile.data), run.profile
    chosen, *others = choices = _choices(profile)
    ids: dict[TextSettings, str] = {}
    for choice in choices if parent else others:
        other = (choice.tokenizer != chosen.tokenizer and not _is_open(profile.tokenizer)) or (
            choice.data.bos != profile.data.bos != "auto"
        )
        if parent is None or not other:  # with a parent, what the profile leaves open
            with suppress(TokenizerError):
                ids[choice] = choice.inputs(sources).dataset_id
    if parent is not None:
        same = {dataset_id: choice for choice, dataset_id in reversed(ids.items())}
        chosen = same.get(parent.manifest.dataset_id) or as_checkpoint(parent, profile)
    inputs = chosen.inputs(sources)
    if inputs.loaded is not None:
        facts_of(profile).check_tokenizer(inputs.loaded)
    _refuse_another_choice(run, inputs.dataset_id, ids)
    if parent is None or parent.manifest.dataset_id != inputs.dataset_id:
        try:
            _warn_of_other_ids(profile, parent, inputs)
        except TokenizerError as error:
            _log.warning("The tokenizer's ids could not be compared with the model's own: %s", error)
    return chosen, inputs.dataset_id


def as_checkpoint(checkpoint: CheckpointRef, profile: Profile, *, always: bool = False) -> TextSettings:
    """Return a profile's settings with a checkpoint's tokenizer and BOS where they leave them open, or `always`."""
    data, settings = profile.data, profile.tokenizer
    if always or _is_open(settings):
        path = {"path": str(tokenizer_directory(checkpoint)), "revision": None, "train": False}
        settings = settings.model_copy(update=path)
    its_own = always
    if data.bos == "auto" and settings.path is not None and not always:
        loaded = load_tokenizer(settings.path, eos_token=settings.eos_token, revision=settings.revision, bos=False)
        its_own = any(e.path == TOKENIZER_FILE and e.sha256 == loaded.sha256 for e in checkpoint.manifest.files)
    if its_own:
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


def _refuse_another_choice(run: Run, dataset_id: str, others: dict[TextSettings, str]) -> None:
    """Raise RunSettingsChangedError if the run was made by one of the others, and say how to go on with it."""
    made, profile = {ref.manifest.dataset_id for ref in run.checkpoints.history()}, run.profile
    if not made or dataset_id in made:
        return
    for choice, other_id in others.items():
        then = []
        if profile.tokenizer.path is None and profile.tokenizer.train != (trained := choice.tokenizer.path is None):
            then.append(f"tokenizer.train={str(trained).lower()}")
        if choice.data.bos != profile.data.bos:
            then.append(f"data.bos={str(choice.data.bos).lower()}")
        if other_id in made and then:
            raise RunSettingsChangedError(
                f"Run {run.run_id!r} in {run.store_uri} was made with {' and '.join(then)}; these settings now give "
                f"another dataset. Nothing was changed. Go on with --set {' --set '.join(then)} (or the same in the "
                "profile), or give these settings a run of their own with another --run-id."
            )


def _warn_of_other_ids(profile: Profile, parent: CheckpointRef | None, inputs: DatasetInputs | MixtureInputs) -> None:
    """Warn if the model that training begins with learned other ids than a dataset's."""
    own: Callable[[], tuple[str, str | None]]
    if parent is not None and any(entry.path == TOKENIZER_FILE for entry in parent.manifest.files):
        whose, own = parent.uri, lambda: (str(tokenizer_directory(parent)), None)
    elif parent is None and profile.model.pretrained is not None:
        pretrained = profile.model.pretrained
        whose, own = f"model.pretrained {pretrained!r}", lambda: (pretrained, profile.model.revision)
    else:
        return
    difference: str | None = "they are those of a tokenizer trained on this text"
    if inputs.loaded is not None:
        difference = differing_ids(*own(), inputs.loaded)
    if difference is not None:
        _log.warning(
            "ANOTHER TOKENIZER THAN THE MODEL'S: the embeddings of %s were learned for other ids (%s). "
            "Leave tokenizer.path and tokenizer.train out to use its own.", whose, difference
        )  # fmt: skip
