"""Bundles on this machine's disk: fetched once, verified, and kept apart."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import FILES, checkpoint_manifest, write_files
from test_bundle import PREFIX, committed, contents

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.fetch import fetch_bundle, keep_fetched, verify_bundle
from relora_train.checkpoints.manifest import hash_file
from relora_train.errors import (
    CheckpointCorruptError,
    DiskFullError,
    StoreUnavailableError,
)
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store


def test_intact_files_in_the_cache_are_reused_and_damaged_ones_fetched_again(tmp_path):
    store = open_store(f"memory://{uuid.uuid4().hex}")
    manifest = committed(store, tmp_path / "a")
    cache = fetch_bundle(store, PREFIX, manifest, tmp_path / "cache")
    store.delete(f"{PREFIX}/model.safetensors")
    fetch_bundle(store, PREFIX, manifest, cache)
    (cache / "config.json").write_bytes(b"y" * FILES["config.json"])
    (cache / ".config.json.part").write_bytes(b"left by a kill")
    fetch_bundle(store, PREFIX, manifest, cache)
    assert contents(cache) == contents(tmp_path / "a")
    assert not (cache / ".config.json.part").exists()


class CountingStore(MemoryStore):
    """Knows which objects were downloaded."""

    def __init__(self) -> None:
        super().__init__()
        self.downloaded: list[str] = []

    def get_file(self, key: str, path: Path) -> None:
        self.downloaded.append(key.removeprefix(f"{PREFIX}/"))
        super().get_file(key, path)


def test_what_was_committed_from_this_machine_is_not_downloaded_again(tmp_path):
    store = CountingStore()
    manifest = committed(store, tmp_path / "a")
    keep_fetched(store, manifest, manifest, tmp_path / "a", tmp_path / "cache" / "a")
    assert not (tmp_path / "a").exists()
    fetched = fetch_bundle(store, PREFIX, manifest, tmp_path / "cache" / "a")
    assert store.downloaded == []
    (fetched / "config.json").write_bytes(b"x" * 40)
    fetch_bundle(store, PREFIX, manifest, fetched)
    assert store.downloaded == ["config.json"]  # what is kept is checked like any other copy


def test_what_lost_against_another_attempt_is_not_taken_for_the_winner(tmp_path):
    store = CountingStore()
    winner = committed(store, tmp_path / "a", "a")
    loser = checkpoint_manifest(write_files(tmp_path / "b", "b"))
    assert commit_bundle(store, PREFIX, tmp_path / "b", loser) == winner
    keep_fetched(store, loser, winner, tmp_path / "b", tmp_path / "cache")
    assert contents(fetch_bundle(store, PREFIX, winner, tmp_path / "cache")) == contents(tmp_path / "a")
    assert sorted(store.downloaded) == sorted(FILES)


def test_two_that_fetch_into_one_directory_do_not_disturb_each_other(s3_store_uri, tmp_path):
    store = open_store(s3_store_uri)
    manifest = committed(store, tmp_path / "a")
    with ThreadPoolExecutor(4) as pool:
        fetched = list(pool.map(lambda _: fetch_bundle(store, PREFIX, manifest, tmp_path / "cache"), range(4)))
    assert contents(fetched[0]) == contents(tmp_path / "a")


def test_too_little_space_is_said_before_anything_is_downloaded(tmp_path):
    store = MemoryStore("space")
    manifest = committed(store, tmp_path / "a")
    huge = [entry.model_copy(update={"size_bytes": 1 << 60}) for entry in manifest.files]
    with pytest.raises(DiskFullError, match=f"{(1 << 60) * len(huge)} are needed"):
        fetch_bundle(store, PREFIX, manifest.model_copy(update={"files": tuple(huge)}), tmp_path / "cache")


def test_a_symbolic_link_in_the_cache_leads_nothing_outside(tmp_path):
    store = MemoryStore("links")
    manifest = committed(store, tmp_path / "a")
    (tmp_path / "outside").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/adapter").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointCorruptError, match="symbolic link"):
        fetch_bundle(store, PREFIX, manifest, tmp_path / "cache")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("limit", [299, 300, 301])
def test_each_file_is_downloaded_once_whatever_its_size(tmp_path, monkeypatch, limit):
    monkeypatch.setattr("relora_train.checkpoints.fetch._SMALL_BYTES", limit)
    store = CountingStore()
    fetch_bundle(store, PREFIX, committed(store, tmp_path / "a"), tmp_path / "cache")
    assert sorted(store.downloaded) == sorted(FILES)


def test_a_file_that_was_checked_is_not_read_again_by_the_same_process(tmp_path, monkeypatch):
    store, hashed = CountingStore(), []
    manifest = committed(store, tmp_path / "a")
    cache = fetch_bundle(store, PREFIX, manifest, tmp_path / "cache")
    now = time.time() + 60  # what was written just now may still change within its time stamp
    monkeypatch.setattr("relora_train.checkpoints.fetch.time.time", lambda: now)
    fetch_bundle(store, PREFIX, manifest, cache)
    noted = lambda path: hashed.append(path) or hash_file(path)  # noqa: E731
    monkeypatch.setattr("relora_train.checkpoints.fetch.hash_file", noted)
    fetch_bundle(store, PREFIX, manifest, cache)
    assert hashed == []
    verify_bundle(store, PREFIX, manifest)
    assert len(hashed) == len(FILES), "and verify reads every byte"


def test_two_bundles_are_kept_side_by_side(tmp_path):
    store = CountingStore()
    for name in ("a", "b"):
        manifest = checkpoint_manifest(write_files(tmp_path / name, name), work=name)
        placed = commit_bundle(store, name, tmp_path / name, manifest)
        keep_fetched(store, manifest, placed, tmp_path / name, tmp_path / "cache" / name)
        assert not (tmp_path / name).exists() and contents(tmp_path / "cache" / name)


def test_the_first_failure_ends_the_downloads_that_wait(tmp_path):
    class Fails(MemoryStore):
        begun = 0

        def get_file(self, key, path):
            self.begun += 1
            if key.endswith("0000"):
                raise StoreUnavailableError(key)
            time.sleep(1)  # long enough for the failure to be heard
            super().get_file(key, path)

    store, source = Fails(), tmp_path / "a"
    source.mkdir()
    for number in range(40):
        (source / f"{number:04d}").write_bytes(b"x")
    manifest = commit_bundle(store, PREFIX, source, checkpoint_manifest(source))
    with pytest.raises(StoreUnavailableError, match="0000"):
        fetch_bundle(store, PREFIX, manifest, tmp_path / "cache")
    assert store.begun < 40


def test_verifying_says_that_a_file_does_not_fit_before_it_is_downloaded(tmp_path):
    store = CountingStore()
    manifest = committed(store, tmp_path / "a")
    huge = manifest.files[0].model_copy(update={"size_bytes": 1 << 60})
    with pytest.raises(DiskFullError, match=f"{1 << 60} are needed"):
        verify_bundle(store, PREFIX, manifest.model_copy(update={"files": (huge,)}))
    assert store.downloaded == []
