"""A bundle exists when its manifest does; then every byte is its writer's, whoever else wrote and whatever crashed."""

import json
import logging
from pathlib import Path

import pytest
from bundles import FILES, checkpoint_manifest, dataset_manifest, write_files
from fault_proxy import faulty_way_to, flip_a_bit_of_the_answer

from relora_train.checkpoints.commit import commit_bundle, remove_leftovers
from relora_train.checkpoints.fetch import check_local, fetch_bundle, verify_bundle
from relora_train.checkpoints.lineage import Tombstone
from relora_train.checkpoints.manifest import CheckpointManifest, read_manifest
from relora_train.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    PreconditionFailedError,
    RunInUseError,
    StorageError,
    StoreUnavailableError,
)
from relora_train.storage.base import ObjectStore
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store

PREFIX = "runs/run/checkpoints/step-00000400-abc"


def committed(store: ObjectStore, directory: Path, seed: str = "a") -> CheckpointManifest:
    return commit_bundle(store, PREFIX, directory, checkpoint_manifest(write_files(directory, seed)))


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES}


def test_what_was_committed_is_fetched_byte_for_byte(store, tmp_path):
    manifest = committed(store, tmp_path / "a")
    assert read_manifest(store, PREFIX, CheckpointManifest) == manifest
    verify_bundle(store, PREFIX, manifest)
    fetched = fetch_bundle(store, PREFIX, manifest, tmp_path / "cache")
    assert contents(fetched) == contents(tmp_path / "a")
    assert json.loads((fetched / "manifest.json").read_bytes()) == json.loads(manifest.to_bytes())


def test_the_usual_bundle_has_plain_names_and_a_directory_store_hands_it_out_in_place(tmp_path):
    store = open_store(tmp_path / "store")
    manifest = committed(store, tmp_path / "a")
    assert manifest.files_prefix == ""
    assert fetch_bundle(store, PREFIX, manifest, tmp_path / "cache") == tmp_path / "store" / PREFIX
    assert not (tmp_path / "cache").exists()
    assert contents(tmp_path / "store" / PREFIX) == contents(tmp_path / "a")


def test_nothing_is_there_before_the_manifest(store, tmp_path):
    assert read_manifest(store, PREFIX, CheckpointManifest) is None
    write_files(tmp_path / "a", "a")
    for name in FILES:
        store.put_file(f"{PREFIX}/{name}", tmp_path / "a" / name)
    assert read_manifest(store, PREFIX, CheckpointManifest) is None


def test_committing_again_changes_nothing(store, tmp_path, caplog):
    manifest = committed(store, tmp_path / "a")
    before = list(store.list())
    assert commit_bundle(store, PREFIX, tmp_path / "a", manifest) == manifest
    assert list(store.list()) == before
    assert not caplog.records


def test_the_first_manifest_wins_and_later_attempts_adopt_it(store, tmp_path, caplog):
    first = committed(store, tmp_path / "a", "a")
    before = list(store.list())
    with caplog.at_level(logging.WARNING):
        second = committed(store, tmp_path / "b", "b")
    assert second == first
    assert first.attempt in caplog.text
    assert list(store.list()) == before
    verify_bundle(store, PREFIX, second)


def test_other_work_at_the_same_prefix_is_refused(store, tmp_path):
    first = committed(store, tmp_path / "a")
    other = checkpoint_manifest(write_files(tmp_path / "b", "b"), work="other settings")
    with pytest.raises(PreconditionFailedError, match="already holds other work"):
        commit_bundle(store, PREFIX, tmp_path / "b", other)
    verify_bundle(store, PREFIX, first)


def test_datasets_are_bundles_too(store, tmp_path):
    manifest = dataset_manifest(write_files(tmp_path / "a", "a"))
    assert commit_bundle(store, "datasets/corpus/d", tmp_path / "a", manifest) == manifest
    again = commit_bundle(
        store, "datasets/corpus/d", tmp_path / "b", dataset_manifest(write_files(tmp_path / "b", "b"))
    )
    assert again == manifest


def test_a_bundle_can_be_a_store_of_its_own(store, tmp_path):
    manifest = committed(store, tmp_path / "a")
    if store.uri.startswith("memory"):
        own, prefix = store, PREFIX
    else:
        own, prefix = open_store(f"{store.uri}/{PREFIX}"), ""
    assert read_manifest(own, prefix, CheckpointManifest) == manifest
    verify_bundle(own, prefix, manifest)
    assert contents(fetch_bundle(own, prefix, manifest, tmp_path / "cache")) == contents(tmp_path / "a")


# --- crashes ---


def test_a_retry_with_the_same_bytes_uploads_nothing_twice(store, tmp_path):
    write_files(tmp_path / "a", "a")
    interrupted = OnlySomeWrites(store, allowed=1 + len(FILES))
    with pytest.raises(ConnectionAbortedError):
        commit_bundle(interrupted, PREFIX, tmp_path / "a", checkpoint_manifest(tmp_path / "a"))
    retry = OnlySomeWrites(store, allowed=2)  # the claim is asked for, the manifest is written
    manifest = commit_bundle(retry, PREFIX, tmp_path / "a", checkpoint_manifest(tmp_path / "a"))
    verify_bundle(store, PREFIX, manifest)


def test_files_found_under_the_names_without_a_claim_are_not_trusted(tmp_path):
    store = MemoryStore()
    store.put_bytes(f"{PREFIX}/model.safetensors", b"?" * FILES["model.safetensors"])
    verify_bundle(store, PREFIX, committed(store, tmp_path / "a"))


def test_a_store_that_loses_an_upload_gets_no_manifest(tmp_path):
    class Loses(MemoryStore):
        def put_file(self, key: str, path: Path) -> None:
            if not key.endswith("config.json"):
                super().put_file(key, path)

    store = Loses()
    with pytest.raises(StoreUnavailableError, match=r"config\.json .* no such object"):
        committed(store, tmp_path / "a")
    assert read_manifest(store, PREFIX, CheckpointManifest) is None


class OnlySomeWrites:
    """A store whose connection breaks after some writes."""

    def __init__(self, store: ObjectStore, allowed: int) -> None:
        self.store, self.allowed = store, allowed

    def __getattr__(self, name: str):
        if name in ("put_bytes", "put_file"):
            if self.allowed == 0:
                raise ConnectionAbortedError
            self.allowed -= 1
        return getattr(self.store, name)


def test_what_dropped_attempts_wrote_goes_and_nothing_else(store, tmp_path):
    committed(store, tmp_path / "a")
    manifest = read_manifest(store, PREFIX, CheckpointManifest)
    listed = [info.key for info in store.list(PREFIX)]
    for name in ("stranger.txt", f"variant-{'0' * 16}/stranger.txt", "variant-x/config.json"):
        store.put_bytes(f"{PREFIX}/{name}", b"of somebody")
    kept = [info.key for info in store.list(PREFIX)]
    for name in ("config.json", "adapter/adapter_model.safetensors"):
        store.put_bytes(f"{PREFIX}/variant-{'0' * 16}/{name}", b"of a killed attempt")
    remove_leftovers(store, PREFIX, manifest)
    assert [info.key for info in store.list(PREFIX)] == kept and set(listed) < set(kept)
    verify_bundle(store, PREFIX, manifest)


# --- races ---


# --- damage ---


def test_one_flipped_bit_at_rest_is_refused_by_name(store, tmp_path):
    manifest = committed(store, tmp_path / "a")
    data = store.get_bytes(f"{PREFIX}/model.safetensors")[0]
    store.put_bytes(f"{PREFIX}/model.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    expected = next(entry.sha256 for entry in manifest.files if entry.path == "model.safetensors")
    cache = tmp_path / "cache"
    for read in (lambda: verify_bundle(store, PREFIX, manifest), lambda: fetch_bundle(store, PREFIX, manifest, cache)):
        with pytest.raises(CheckpointCorruptError, match=f"{PREFIX}/model.+ is damaged.*{expected}") as caught:
            read()
        assert "Use another checkpoint" in str(caught.value) and store.uri in str(caught.value)
    assert not (cache / "model.safetensors").exists() and not (cache / "manifest.json").exists()
    assert not list(tmp_path.glob("cache/**/*.part"))


@pytest.mark.parametrize("size_bytes", [1, 1 << 20, 5 << 20, (64 << 20) + 1])
def test_one_flipped_bit_of_a_file_of_any_size_is_refused_by_every_reader(tmp_path, size_bytes):
    """What was committed, downloaded, kept from before or verified in place; the last is large to a transfer."""
    directory = write_files(tmp_path / "a", "a")
    (directory / "model.safetensors").write_bytes(bytes(size_bytes))
    made = checkpoint_manifest(directory)
    local, remote, cache = open_store(tmp_path / "store"), MemoryStore(), tmp_path / "cache"
    flipped = tmp_path / "flipped"
    flipped.write_bytes(bytes(size_bytes - 1) + b"\1")
    for store in (local, remote):
        commit_bundle(store, PREFIX, directory, made)
        store.put_file(f"{PREFIX}/model.safetensors", flipped)
        for read in (
            lambda s=store: verify_bundle(s, PREFIX, made),
            lambda s=store: fetch_bundle(s, PREFIX, made, cache),
        ):
            with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors is damaged"):
                read()
    remote.put_file(f"{PREFIX}/model.safetensors", directory / "model.safetensors")
    model = fetch_bundle(remote, PREFIX, made, cache) / "model.safetensors"
    for path in (model, directory / "model.safetensors"):
        with path.open("r+b") as stream:
            stream.write(b"\1")
    assert fetch_bundle(remote, PREFIX, made, cache) == cache and not model.read_bytes().strip(b"\0")
    with pytest.raises(CheckpointCorruptError):
        check_local(directory, made)
    with pytest.raises(CheckpointCorruptError):
        commit_bundle(remote, "elsewhere", directory, made)


def test_a_truncated_file_is_refused_with_both_sizes(store, tmp_path):
    manifest = committed(store, tmp_path / "a")
    store.put_bytes(f"{PREFIX}/model.safetensors", b"short")
    with pytest.raises(CheckpointCorruptError, match="5000 bytes, found 5 bytes"):
        verify_bundle(store, PREFIX, manifest)


def test_a_missing_file_is_incomplete_and_named(store, tmp_path):
    manifest = committed(store, tmp_path / "a")
    store.delete(f"{PREFIX}/adapter/adapter_model.safetensors")
    for read in (verify_bundle, lambda *args: fetch_bundle(*args, tmp_path / "cache")):
        with pytest.raises(CheckpointIncompleteError, match=f"{PREFIX}/adapter/adapter_model.safetensors"):
            read(store, PREFIX, manifest)


def test_a_damaged_manifest_is_refused_and_not_overwritten(store, tmp_path):
    committed(store, tmp_path / "a")
    store.put_bytes(f"{PREFIX}/manifest.json", b'{"kind": "checkpoint"')
    with pytest.raises(CheckpointCorruptError, match=f"{PREFIX}/manifest.json"):
        committed(store, tmp_path / "a")


def test_a_bit_flipped_on_the_way_down_is_noticed_and_fetched_again(
    s3_store_uri, seaweed, tmp_path, monkeypatch, caplog
):
    manifest = committed(open_store(s3_store_uri), tmp_path / "a")
    with faulty_way_to(seaweed.endpoint) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", faults.endpoint)
        store = open_store(s3_store_uri)
        # botocore validates whole-object answers itself and repeats them; the ranged ones of large files are ours.
        ranged = RangedStore(store)
        faults.plan("GET", "model.safetensors", flip_a_bit_of_the_answer)
        fetched = fetch_bundle(ranged, PREFIX, manifest, tmp_path / "cache")
        assert contents(fetched) == contents(tmp_path / "a")
        assert "once more" in caplog.text
        faults.plan("GET", "config.json", flip_a_bit_of_the_answer, flip_a_bit_of_the_answer)
        with pytest.raises(CheckpointCorruptError, match=r"config\.json"):
            fetch_bundle(ranged, PREFIX, manifest, tmp_path / "other")
        assert faults.planned == []


class RangedStore:
    """An S3 store that downloads by ranged GETs, as it does with files of several parts."""

    def __init__(self, store) -> None:
        self.store = store

    def __getattr__(self, name: str):
        return getattr(self.store, name)

    def get_file(self, key: str, path: Path) -> None:
        size_bytes = self.store.head(key).size_bytes
        if size_bytes == 0:
            path.write_bytes(b"")
            return
        answer = self.store._client.get_object(
            Bucket=self.store._bucket, Key=self.store._root + key, Range=f"bytes=0-{size_bytes - 1}"
        )
        path.write_bytes(answer["Body"].read())


def test_files_that_changed_after_their_manifest_are_not_committed(store, tmp_path):
    manifest = checkpoint_manifest(write_files(tmp_path / "a", "a"))
    (tmp_path / "a/config.json").write_bytes(b"x" * FILES["config.json"])
    with pytest.raises(CheckpointCorruptError, match=r"config\.json"):
        commit_bundle(store, PREFIX, tmp_path / "a", manifest)
    (tmp_path / "a/config.json").unlink()
    with pytest.raises(CheckpointIncompleteError, match=r"config\.json"):
        commit_bundle(store, PREFIX, tmp_path / "a", manifest)
    assert list(store.list()) == []


# --- the cache ---


@pytest.mark.parametrize("name", ["claim.json", "variant-0123456789abcdef/x"])
def test_names_that_the_protocol_uses_are_refused(tmp_path, name):
    path = write_files(tmp_path / "a", "a") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"1")
    with pytest.raises(StorageError, match="reserved"):
        commit_bundle(MemoryStore(), PREFIX, tmp_path / "a", checkpoint_manifest(tmp_path / "a"))


# --- what each step asks, leaves and says


def test_every_file_and_at_last_the_manifest_asks_for_permission(tmp_path):
    for refused_at in (*range(1, len(FILES) + 2), None):
        store, asked = MemoryStore(), []

        def permit(store=store, asked=asked, refused_at=refused_at):
            asked.append({info.key for info in store.list(PREFIX)})
            if len(asked) == refused_at:
                raise RunInUseError("another flow took over")

        manifest = checkpoint_manifest(write_files(tmp_path / "a", "a"))
        if refused_at is not None:
            with pytest.raises(RunInUseError):
                commit_bundle(store, PREFIX, tmp_path / "a", manifest, check_lease=permit)
            assert read_manifest(store, PREFIX, CheckpointManifest) is None
            assert len(asked) == refused_at, "nothing is written after a refusal"
    commit_bundle(store, PREFIX, tmp_path / "a", manifest, check_lease=permit)
    claim = f"{PREFIX}/claim.json"
    assert [len(keys - {claim}) for keys in asked] == list(range(len(FILES) + 1))
    assert json.loads(store.get_bytes(claim)[0])["attempt"] == manifest.attempt


def test_where_a_checkpoint_was_removed_nothing_is_committed(tmp_path):
    store = MemoryStore("removed")
    manifest = checkpoint_manifest(write_files(tmp_path / "a", "a"))
    store.put_bytes(f"{PREFIX}/deleted.json", Tombstone(reason="tidy", manifest=manifest).to_bytes())
    with pytest.raises(PreconditionFailedError, match=f"memory://removed/{PREFIX} was removed by .*tidy"):
        commit_bundle(store, PREFIX, tmp_path / "a", manifest)
    assert [info.key for info in store.list()] == [f"{PREFIX}/deleted.json"]


def test_a_commit_beside_a_dropped_attempt_clears_what_that_one_wrote(tmp_path):
    store = MemoryStore("dropped")
    store.put_bytes(f"{PREFIX}/claim.json", b'{"content": "of the other"}')
    store.put_bytes(f"{PREFIX}/config.json", b"of the other")
    placed = committed(store, tmp_path / "a")
    names = {info.key.removeprefix(f"{PREFIX}/") for info in store.list()}
    assert names == {"claim.json", "manifest.json", *(f"{placed.files_prefix}/{name}" for name in FILES)}


def test_leftovers_that_cannot_be_removed_are_no_failure_and_said(tmp_path, caplog):
    class Keeps(MemoryStore):
        def delete(self, key):
            raise StoreUnavailableError("not now")

    store = Keeps("keeps")
    manifest = committed(store, tmp_path / "a")
    store.put_bytes(f"{PREFIX}/variant-{'0' * 16}/config.json", b"x")
    remove_leftovers(store, PREFIX, manifest)
    assert f"memory://keeps/{PREFIX}: leftovers" in caplog.text and "not now" in caplog.text
