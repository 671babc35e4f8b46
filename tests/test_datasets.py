"""`relora datasets`: it knows what depends on a dataset, and removes nothing that is needed or may be about to be."""

import json
from collections.abc import Callable
from datetime import timedelta

import pytest
from bundles import checkpoint_manifest, dataset_manifest
from test_pruning import Interfering

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.layout import DELETING_NAME, dataset_prefix
from relora_train.checkpoints.lease import hold_run, hold_series
from relora_train.checkpoints.manifest import MixedDataset
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.series import promote
from relora_train.checkpoints.series_record import Scores
from relora_train.checkpoints.upkeep.datasets import check_not_deleting, delete_dataset, list_datasets
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.errors import (
    CheckpointAmbiguousError,
    CheckpointCorruptError,
    CheckpointNotFoundError,
    DatasetInUseError,
    StoreUnavailableError,
)
from relora_train.storage.base import ObjectStore

A, B, MIXED, FREE = (letter * 64 for letter in "abcd")


@pytest.fixture
def filled(memory: ObjectStore, files) -> ObjectStore:
    """A mixture of two datasets with a run on it and a series scored on one of them, and a dataset of nobody."""
    for name, dataset_id in (("a", A), ("b", B), ("free", FREE)):
        commit_bundle(
            memory, dataset_prefix(name, dataset_id), files, dataset_manifest(files, name=name, dataset_id=dataset_id)
        )
    parts = tuple(MixedDataset(name=n, weight="1/2", dataset_id=i, train_tokens=1) for n, i in (("a", A), ("b", B)))
    mixture = dataset_manifest(files, name="mixed", dataset_id=MIXED).model_copy(update={"mixture": parts})
    commit_bundle(memory, dataset_prefix("mixed", MIXED), files, mixture)
    uri = f"s3://what/it/was/called/{dataset_prefix('mixed', MIXED)}"
    manifest = checkpoint_manifest(files).model_copy(update={"dataset_uri": uri, "dataset_id": MIXED})
    ref = CheckpointStore(memory, "run").commit(files, manifest)
    scored = f"{memory.uri}/{dataset_prefix('a', A)}"
    promote(memory, "s", ref, reason="", scores=Scores(candidate_loss=1, champion_loss=None, dataset_uri=scored))
    return memory


def used(store: ObjectStore) -> dict[str, tuple[str, ...]]:
    return {each.name.partition("/")[0]: each.used_by for each in list_datasets(store)}


def test_it_is_known_what_depends_on_each_dataset(filled):
    mixture = f"mixture mixed/{MIXED[:16]}"
    assert used(filled) == {
        "a": ("series s", mixture),
        "b": (mixture,),
        "free": (),
        "mixed": ("run run (1 checkpoint)",),
    }


@pytest.mark.parametrize("name", ["a", "b", "mixed"])
def test_a_dataset_that_is_needed_stays_and_what_needs_it_is_named(filled, name):
    before, needed_by = [info.key for info in filled.list("")], used(filled)[name]
    with pytest.raises(DatasetInUseError) as error:
        delete_dataset(filled, next(each.name for each in list_datasets(filled) if each.name.startswith(f"{name}/")))
    assert all(one in str(error.value) for one in needed_by)
    assert [info.key for info in filled.list("")] == before


@pytest.mark.parametrize("name", [f"free/{FREE[:16]}", FREE, FREE[:6], "uri"])
def test_a_dataset_of_nobody_goes_by_any_of_its_names_and_alone(filled, name):
    gone = delete_dataset(filled, f"{filled.uri}/{dataset_prefix('free', FREE)}" if name == "uri" else name)
    assert (gone.name, used(filled).keys()) == (f"free/{FREE[:16]}", {"a", "b", "mixed"})
    assert not list(filled.list("datasets/free/"))


def test_a_name_of_none_or_of_two_is_refused(memory, files):
    for name in ("one", "two"):
        commit_bundle(memory, dataset_prefix(name, FREE), files, dataset_manifest(files, name=name, dataset_id=FREE))
    with pytest.raises(CheckpointAmbiguousError, match=r"one/d{16}, two/d{16}"):
        delete_dataset(memory, FREE)
    for absent in ("one", "three", FREE[:5], "e" * 16):
        with pytest.raises(CheckpointNotFoundError, match=r"Datasets there: one/d{16}, two/d{16}"):
            delete_dataset(memory, absent)


HOLDERS: dict[str, Callable[[ObjectStore], object]] = {
    "run making": lambda store: hold_run(store, "making"),
    "series nightly": lambda store: hold_series(store, "nightly"),
}


@pytest.mark.parametrize("who", HOLDERS)
def test_nothing_goes_while_a_flow_that_may_take_it_is_under_way(memory, files, who):
    commit_bundle(memory, dataset_prefix("free", FREE), files, dataset_manifest(files, name="free", dataset_id=FREE))
    with HOLDERS[who](memory), pytest.raises(DatasetInUseError, match=f"the flow of {who}, which is under way"):
        delete_dataset(memory, FREE)
    assert delete_dataset(memory, FREE).name == f"free/{FREE[:16]}"


def test_a_lease_of_another_machine_counts_until_it_is_silent_for_its_time(memory, files, monkeypatch):
    commit_bundle(memory, dataset_prefix("free", FREE), files, dataset_manifest(files, name="free", dataset_id=FREE))
    with hold_run(memory, "gone"):
        left = memory.get_bytes("runs/gone/lease.json")[0]
    holder = {**json.loads(left)["holder"], "host": "elsewhere"}
    record = {**json.loads(left), "holder": holder, "released": False, "ttl_seconds": 60}
    memory.put_bytes("runs/gone/lease.json", json.dumps(record).encode())
    with pytest.raises(DatasetInUseError, match="run gone"):
        delete_dataset(memory, FREE)
    monkeypatch.setattr("relora_train.checkpoints.upkeep.datasets.OBSERVED_TTLS", -1)  # as if it had been silent
    delete_dataset(memory, FREE)


def test_whoever_begins_to_need_it_during_the_removal_keeps_it_or_is_told(memory, files):
    prefix = dataset_prefix("free", FREE)
    commit_bundle(memory, prefix, files, dataset_manifest(files, name="free", dataset_id=FREE))
    manifest = checkpoint_manifest(files).model_copy(update={"dataset_uri": f"{memory.uri}/{prefix}"})
    late = Interfering(memory, lambda: CheckpointStore(memory, "run").commit(files, manifest), DELETING_NAME)
    with pytest.raises(DatasetInUseError, match="run run"):
        delete_dataset(late, FREE)
    check_not_deleting(memory, prefix)
    told: list[str] = []

    def look() -> None:
        with pytest.raises(StoreUnavailableError, match="is being deleted") as error:
            check_not_deleting(memory, prefix)
        told.append(str(error.value))

    for info in list(memory.list("runs/")):
        memory.delete(info.key)
    delete_dataset(Interfering(memory, look, DELETING_NAME), FREE)
    assert told and not list(memory.list("datasets/"))
    check_not_deleting(memory, prefix)


def test_a_removal_that_was_killed_is_invisible_and_ended_by_the_same_command(store, files):
    prefix = dataset_prefix("free", FREE)
    commit_bundle(store, prefix, files, dataset_manifest(files, name="free", dataset_id=FREE))
    objects = len(list(store.list(prefix)))
    for survived in range(objects):

        class Dying:
            left = survived

            def __getattr__(self, name):
                return getattr(store, name)

            def delete(self, key):
                if not self.left:
                    raise KeyboardInterrupt
                self.left -= 1
                store.delete(key)

        with pytest.raises(KeyboardInterrupt):
            delete_dataset(Dying(), FREE)
        (left,) = list_datasets(store)
        assert (left.manifest is None) == (survived > 0), "the manifest goes first"
        with pytest.raises(StoreUnavailableError, match=f"relora datasets --delete {left.name}"):
            check_not_deleting(store, prefix)
        delete_dataset(store, FREE[:16])
        assert not list(store.list("datasets/"))
        commit_bundle(store, prefix, files, dataset_manifest(files, name="free", dataset_id=FREE))  # made anew


def test_what_cannot_be_read_may_need_any_dataset(filled):
    filled.put_bytes("series/s/promoted.json", b"{}")
    with pytest.raises(CheckpointCorruptError):
        delete_dataset(filled, FREE)
    assert used_names(filled) == ["a", "b", "free", "mixed"]


def used_names(store: ObjectStore) -> list[str]:
    return sorted({info.key.split("/")[1] for info in store.list("datasets/") if info.key.endswith("manifest.json")})


def test_verify_reads_the_sources_of_a_mixture_too(filled, files):
    manifest = checkpoint_manifest(files, run_id="other", step=800).model_copy(
        update={"dataset_uri": f"{filled.uri}/{dataset_prefix('mixed', MIXED)}"}
    )
    CheckpointStore(filled, "other").commit(files, manifest)
    assert verify_run(filled, "other").is_clean
    damaged = f"{dataset_prefix('b', B)}/model.safetensors"
    filled.put_bytes(damaged, filled.get_bytes(damaged)[0][::-1])
    filled.delete(f"{dataset_prefix('a', A)}/manifest.json")
    found = {(each.kind, each.uri) for each in verify_run(filled, "other").findings}
    missing = ("missing", f"{filled.uri}/{dataset_prefix('a', A)}")
    assert found == {missing, ("damaged", f"{filled.uri}/{damaged}")}


def test_the_command_lists_deletes_and_refuses(tmp_path, files, relora):
    from relora_train.storage.opening import open_store

    at = ("--store", str(tmp_path / "store"))
    assert "There is no dataset" in relora("datasets", *at).out
    store = open_store(tmp_path / "store")
    commit_bundle(store, dataset_prefix("free", FREE), files, dataset_manifest(files, name="free", dataset_id=FREE))
    store.put_bytes(f"{dataset_prefix('half', A)}/train/shard-00000.bin", b"half a dataset")
    shown = relora("datasets", *at).out
    assert f"free/{FREE[:16]}" in shown and "1 tokens" in shown and "unfinished" in shown and "nothing" in shown
    free, half = json.loads(relora("datasets", "--json", *at).out)
    assert (free["dataset_id"], free["used_by"], free["train_tokens"], half["unfinished"]) == (FREE, [], 1, True)
    assert relora("datasets", "--delete", f"half/{A[:16]}", *at).code == 0
    with hold_run(store, "making", ttl_seconds=timedelta(minutes=1).total_seconds()):
        refused = relora("datasets", "--delete", FREE, *at)
    assert (refused.code, "run making" in refused.err) == (2, True)
    assert json.loads(relora("datasets", "--delete", FREE, "--json", *at).out)["size_bytes"] > 5000
    assert relora("datasets", "--delete", FREE, *at).code == 6
