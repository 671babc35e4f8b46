"""The same command after the data changed: what changed is said in words."""

from pathlib import Path

import pytest
from made_up_corpus import made_up_text
from stage_runs import tiny_profile

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.layout import dataset_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import CheckpointManifest, DatasetManifest, FileEntry, hash_file
from relora_train.checkpoints.run import CheckpointStore
from relora_train.data.dataset_changes import dataset_changes
from relora_train.data.prepare import PreparedDataset, prepare_dataset
from relora_train.errors import RunSettingsChangedError
from relora_train.method.stages import plan_stages
from relora_train.runs.find import find_stage, stage_identity
from relora_train.runs.run import DatasetRef, Run
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.storage.opening import open_store

TOKENIZER = TokenizerConfig(vocab_size=270)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"day-{number:02}.txt").write_text(made_up_text(number))
    return tmp_path / "texts"


def prepared(corpus: Path, work: Path, **settings: object) -> PreparedDataset:
    given = {"source": "text", "paths": [str(corpus)], "validation_fraction": 0.3, "workers": 1, **settings}
    return prepare_dataset(DataConfig.model_validate(given), TOKENIZER, work)


def test_files_that_came_went_or_changed_are_named(corpus: Path, tmp_path: Path):
    before = prepared(corpus, tmp_path / "work").manifest
    (corpus / "new_day.txt").write_text(made_up_text(50))
    after = prepared(corpus, tmp_path / "work").manifest
    assert dataset_changes(before, after) == ["data.paths: 12 files -> 13 (new: new_day.txt)"]
    assert dataset_changes(after, before) == ["data.paths: 13 files -> 12 (gone: new_day.txt)"]
    (corpus / "day-03.txt").write_text(made_up_text(51))
    (corpus / "day-04.txt").unlink()
    corpus.rename(tmp_path / "moved")
    moved = prepared(tmp_path / "moved", tmp_path / "work", max_documents=12).manifest
    assert dataset_changes(before, moved) == [
        "data.paths: 12 files -> 12 (new: day-03.txt, new_day.txt; gone: day-03.txt, day-04.txt)",
        "max_documents: absent -> 12",
    ]
    (tmp_path / "moved" / "day-05.txt").write_text(made_up_text(52))
    for number in range(60, 67):
        (tmp_path / "moved" / f"new-{number}.txt").write_text(made_up_text(number))
    more = prepared(tmp_path / "moved", tmp_path / "work", max_documents=12).manifest
    assert dataset_changes(moved, more) == [
        "data.paths: 12 files -> 19 (new: new-60.txt, new-61.txt, new-62.txt, new-63.txt, new-64.txt and 2 more; "
        "changed: day-05.txt)"
    ]


def test_datasets_from_before_the_names_tell_numbers(corpus: Path, tmp_path: Path):
    before = prepared(corpus, tmp_path / "work").manifest
    older = before.model_copy(update={"statistics": {}})
    (corpus / "new_day.txt").write_text("x" * 1000)
    after = prepared(corpus, tmp_path / "work").manifest
    size = before.inputs["source"]["size_bytes"]
    assert dataset_changes(older, after) == [f"data.paths: 12 files -> 13 ({size:,} bytes -> {size + 1000:,})"]


def test_another_python_is_named_where_its_library_is_the_text(corpus: Path, tmp_path: Path):
    manifest = prepared(corpus, tmp_path / "work").manifest
    ours, theirs = (
        manifest.model_copy(
            update={
                "inputs": {**manifest.inputs, "source": {"format": "python-stdlib", "content_sha256": python}},
                "statistics": {"python": python} if python else {},
            }
        )
        for python in ("3.11.7", "3.11.2")
    )
    assert dataset_changes(theirs, ours) == ["the standard library: Python 3.11.2 -> 3.11.7"]
    older = theirs.model_copy(update={"statistics": {}})
    assert dataset_changes(older, ours) == ["the standard library: Python unknown version -> 3.11.7"]


def test_the_same_run_with_another_dataset_is_refused_with_the_files(corpus: Path, tmp_path: Path):
    store = open_store(tmp_path / "store")
    profile = tiny_profile(data={"name": "mine", "source": "text", "paths": (str(corpus),)})
    run, stage = Run("run", store.uri, profile), plan_stages(profile)[0]

    def committed() -> DatasetManifest:
        made = prepared(corpus, tmp_path / "work", name="mine")
        prefix = dataset_prefix("mine", made.manifest.dataset_id)
        return commit_bundle(store, prefix, made.directory, made.manifest)

    before = DatasetRef(store.uri, committed())
    commit_checkpoint(run, before.uri, *stage_identity(run, stage, before.dataset_id, None))
    assert find_stage(run, stage, None, stage_identity(run, stage, before.dataset_id, None)) is not None
    (corpus / "new_day.txt").write_text(made_up_text(50))
    now = DatasetRef(store.uri, committed())
    with pytest.raises(RunSettingsChangedError) as refused:
        find_stage(run, stage, None, stage_identity(run, stage, now.dataset_id, None))
    assert "  - data.paths: 12 files -> 13 (new: new_day.txt)\n" in str(refused.value)
    assert now.dataset_id not in str(refused.value)
    store.delete(f"{before.prefix}/manifest.json")
    with pytest.raises(RunSettingsChangedError, match=rf"dataset_id: {before.dataset_id} -> {now.dataset_id}"):
        find_stage(run, stage, None, stage_identity(run, stage, now.dataset_id, None))


def commit_checkpoint(run: Run, dataset_uri: str, settings: dict[str, object], fingerprint: str) -> CheckpointRef:
    directory = Path(run.store_uri.removeprefix("file://")).parent / "checkpoint"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    entry = FileEntry(path="model.safetensors", size_bytes=7, sha256=hash_file(directory / "model.safetensors"))
    manifest = CheckpointManifest(
        files=(entry,), attempt="a" * 16, run_id=run.run_id, profile="tiny", stage="warm-start", step=6, cycle=0,
        tokens_seen=1, fingerprint=fingerprint, fingerprint_settings=settings, parent=None,
        dataset_id=str(settings["dataset_id"]), dataset_uri=dataset_uri,
    )  # fmt: skip
    return CheckpointStore(open_store(run.store_uri), run.run_id).commit(directory, manifest)
