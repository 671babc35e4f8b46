"""The committed dataset of a profile: found by content in the store, or prepared in a process and put there."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.fetch import keep_fetched
from relora_train.checkpoints.layout import dataset_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import find_dataset
from relora_train.data.images import IMAGE_SOURCES
from relora_train.data.left_out import left_out_note
from relora_train.data.prepare import PreparedDataset, PrepareRequest, describe_dataset
from relora_train.data.selection import Selection
from relora_train.runs.run import DatasetRef, OnEvent, Run, dataset_ref
from relora_train.runs.tokenizer_choice import TextSettings, choose_tokenizer
from relora_train.runs.workers import run_worker
from relora_train.settings.data import TokenizerConfig
from relora_train.storage.workspace import WorkDirectory, dataset_cache, short_digest

_log = logging.getLogger("relora_train.runs.datasets")


@dataclass(frozen=True)
class DatasetOutcome:
    """A dataset, and whether it was there already."""

    dataset: DatasetRef
    reused: bool


@dataclass(frozen=True)
class Corpus:
    """The source of a dataset, if it is not simply what the profile names."""

    tokenizer: TokenizerConfig
    selection: Selection


def prepare_or_reuse(
    run: Run,
    *,
    on_event: OnEvent,
    parent: CheckpointRef | None = None,
    corpus: Corpus | None = None,
) -> DatasetOutcome:
    """Return the committed dataset of the run's corpus and tokenizer, tokenizing only what no attempt has yet.

    parent: the checkpoint that the run goes on from; see choose_tokenizer.
    Safe to repeat and to race: the first commit wins, and what a killed attempt finished on this machine is used.
    """
    store, name, selection = run.store, run.profile.data.name, corpus.selection if corpus else None
    if corpus is None and run.profile.data.source not in IMAGE_SOURCES:
        text, dataset_id = choose_tokenizer(run, parent)
    else:
        text = TextSettings(run.profile.data, corpus.tokenizer if corpus else run.profile.tokenizer)
        dataset_id, _ = describe_dataset(text.data, text.tokenizer, selection=selection)
    if found := find_dataset(store, name, dataset_id):
        return DatasetOutcome(dataset_ref(store, found), reused=True)
    with WorkDirectory("datasets", f"{name}-{dataset_id[:16]}-{short_digest(store.uri)}") as work:
        if work.waited and (found := find_dataset(store, name, dataset_id)):  # by the process that was waited for
            return DatasetOutcome(dataset_ref(store, found), reused=True)
        request = PrepareRequest(
            data=text.data,
            tokenizer=text.tokenizer,
            selection=selection,
            work_directory=work.path,
            result_path=work.path / "result.json",
        )
        run.worker.start(run.profile)  # it gets ready meanwhile
        # The source may lie in a store or on a hub, so this worker keeps the credentials.
        run_worker(
            "relora_train.data.prepare", request, work.path / "request.json", on_event=on_event, keep_secrets=True
        )
        prepared = PreparedDataset.model_validate_json(request.result_path.read_bytes())
        statistics = prepared.manifest.statistics
        for note in (statistics.get("split_note"), left_out_note(statistics.get("left_out", ()))):
            if note:
                _log.warning("Dataset %r: %s.", name, note)
        prefix = dataset_prefix(prepared.manifest.name, prepared.manifest.dataset_id)
        manifest = commit_bundle(store, prefix, prepared.directory, prepared.manifest)
        keep_fetched(store, prepared.manifest, manifest, prepared.directory, dataset_cache(manifest.dataset_id))
    return DatasetOutcome(dataset_ref(store, manifest), reused=False)
