"""Snapshots in a store: the newest valid one is found, a damaged one passed over, no outage stops anything."""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from test_prune_crashes import crash_everywhere

from relora_train.checkpoints.layout import snapshot_name
from relora_train.checkpoints.manifest import SnapshotManifest, describe_files
from relora_train.checkpoints.snapshots import SnapshotStore, local_snapshots, remove_snapshots
from relora_train.errors import AccessDeniedError, StorageError, StoreUnavailableError
from relora_train.runs.background import SnapshotUploader
from relora_train.storage.base import ObjectStore
from relora_train.storage.local import LocalStore
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store

FINGERPRINT = "f" * 64
PREFIX = f"runs/run/snapshots/{FINGERPRINT[:12]}/"


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_store_uri"))
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "store")


def take(root: Path, step: int, attempt: str = "a" * 16, fingerprint: str = FINGERPRINT) -> Path:
    """A committed snapshot directory, as the trainer leaves it."""
    directory = root / snapshot_name(step, attempt)
    directory.mkdir(parents=True)
    (directory / "state.safetensors").write_bytes(f"state of step {step} by {attempt}".encode() * 100)
    (directory / "snapshot.json").write_text(f'{{"step": {step}}}')
    manifest = SnapshotManifest(
        files=describe_files(directory), attempt=attempt, run_id="run", stage="cycle-1", step=step,
        fingerprint=fingerprint,
    )  # fmt: skip
    (directory / "manifest.json").write_bytes(manifest.to_bytes())
    return directory


def snapshots(store: ObjectStore, local: Path, keep: int = 2) -> SnapshotStore:
    return SnapshotStore(store, "run", FINGERPRINT, local, keep=keep)


def stored_names(store: ObjectStore) -> list[str]:
    keys = (info.key.removeprefix(PREFIX) for info in store.list(PREFIX))
    return sorted({key.partition("/")[0] for key in keys})


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_stored(store: ObjectStore, name: str) -> None:
    key = f"{PREFIX}{name}/state.safetensors"
    content = bytearray(store.get_bytes(key)[0])
    content[5] ^= 1
    store.put_bytes(key, bytes(content))


def test_another_machine_gets_the_newest_snapshot_byte_for_byte(store: ObjectStore, tmp_path: Path):
    ours = snapshots(store, tmp_path / "one")
    for step in (10, 20):
        ours.upload(take(tmp_path / "one", step))
    found = snapshots(store, tmp_path / "other").newest_valid()
    assert found is not None and found.step == 20 and found.stored
    for name in ("state.safetensors", "snapshot.json"):
        assert (found.directory / name).read_bytes() == (tmp_path / "one" / found.directory.name / name).read_bytes()


def test_the_store_keeps_the_last_two_and_none_after_the_stage(store: ObjectStore, tmp_path: Path):
    ours = snapshots(store, tmp_path)
    names = []
    for step in (10, 20, 99_999_999, 100_000_000):  # more digits than a name is padded to
        directory = take(tmp_path, step)
        names.append(directory.name)
        ours.upload(directory)
        ours.upload(directory)
    assert stored_names(store) == sorted(names[-2:])
    remove_snapshots(store, PREFIX)
    assert stored_names(store) == []
    assert snapshots(store, tmp_path / "other").newest_valid() is None


def test_a_snapshot_that_was_never_uploaded_counts(store: ObjectStore, tmp_path: Path):
    ours = snapshots(store, tmp_path)
    ours.upload(take(tmp_path, 10))
    newest = take(tmp_path, 20)
    found = snapshots(store, tmp_path).newest_valid()
    assert found is not None and (found.step, found.directory, found.stored) == (20, newest, False)


def test_a_damaged_newest_snapshot_in_the_store_falls_back_to_the_one_before_with_a_warning(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for step in (10, 20):
        snapshots(store, tmp_path / "one").upload(take(tmp_path / "one", step))
    damage_stored(store, snapshot_name(20, "a" * 16))
    other = snapshots(store, tmp_path / "other")
    found = other.newest_valid()
    assert found is not None and found.step == 10
    assert "damaged" in caplog.text and "Going on from the snapshot before it, at step 10" in caplog.text
    other.upload(take(tmp_path / "other", 15, attempt="b" * 16))
    assert stored_names(store) == [snapshot_name(10, "a" * 16), snapshot_name(15, "b" * 16)]  # the damaged one is gone


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_local_snapshot_falls_back(harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    take(tmp_path, 10)
    newest = take(tmp_path, 20)
    match harm:
        case "flip":
            damage(newest / "state.safetensors")
        case "truncate":
            (newest / "state.safetensors").write_bytes(b"")
        case "remove":
            (newest / "state.safetensors").unlink()
        case "manifest":
            (newest / "manifest.json").write_text("{")
    found = snapshots(MemoryStore(), tmp_path).newest_valid()
    assert found is not None and found.step == 10
    assert "at step 10" in caplog.text


def test_a_damaged_local_snapshot_is_replaced_by_its_sound_copy_in_the_store(store: ObjectStore, tmp_path: Path):
    directory = take(tmp_path, 20)
    snapshots(store, tmp_path).upload(directory)
    expected = (directory / "state.safetensors").read_bytes()
    damage(directory / "state.safetensors")
    (directory / "another.safetensors").write_bytes(b"of nobody")
    found = snapshots(store, tmp_path).newest_valid()
    assert found is not None and found.step == 20
    assert (found.directory / "state.safetensors").read_bytes() == expected
    assert not (found.directory / "another.safetensors").exists(), "nothing of the damaged one is left"


def test_only_damaged_snapshots_means_from_the_start_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    damage(take(tmp_path, 20) / "state.safetensors")
    assert snapshots(MemoryStore(), tmp_path).newest_valid() is None
    assert "begins at its start" in caplog.text


def test_what_a_crash_left_without_a_manifest_is_invisible_and_removed(tmp_path: Path):
    take(tmp_path, 10)
    unfinished = take(tmp_path, 20)
    (unfinished / "manifest.json").unlink()
    found = snapshots(MemoryStore(), tmp_path).newest_valid()
    assert found is not None and found.step == 10
    assert not unfinished.exists()


def test_a_snapshot_of_another_stage_under_this_name_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    take(tmp_path, 20, fingerprint="e" * 64)
    assert snapshots(MemoryStore(), tmp_path).newest_valid() is None
    assert "of another stage" in caplog.text


class Writes(MemoryStore):
    """Does something before every write, which may raise."""

    def __init__(self, before: Callable[[str], None]) -> None:
        super().__init__()
        self.before = before

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        self.before(key)
        return super().put_bytes(key, data, if_absent=if_absent, if_match=if_match)

    def delete(self, key: str) -> None:
        self.before(key)
        super().delete(key)


def test_snapshots_go_manifest_first_and_claim_last(tmp_path: Path):
    """Killed in between, no manifest lists what is gone, and no name is free while files lie under it."""
    written: list[str] = []
    store = Writes(written.append)
    for step in (10, 20):
        snapshots(store, tmp_path).upload(take(tmp_path, step))
    written.clear()
    remove_snapshots(store, PREFIX)
    names = [key.rpartition("/")[2] for key in written]
    assert names[:2] == ["manifest.json"] * 2 and names[-2:] == ["claim.json"] * 2 and len(names) == 8


def test_a_kept_snapshot_whose_files_lie_beside_its_manifest_is_kept_whole(tmp_path: Path):
    store = MemoryStore()
    store.put_bytes(f"{PREFIX}{snapshot_name(10, 'a' * 16)}/claim.json", b'{"content": "of another attempt"}')
    for step in (10, 20):
        snapshots(store, tmp_path / "one").upload(take(tmp_path / "one", step))
    damage_stored(store, snapshot_name(20, "a" * 16))
    found = snapshots(store, tmp_path / "other").newest_valid()
    assert found is not None and found.step == 10
    assert (found.directory / "snapshot.json").read_text() == '{"step": 10}'


def test_what_cannot_be_removed_from_this_machine_is_passed_over(tmp_path: Path):
    take(tmp_path, 10)
    (tmp_path / "step-00000020-file").write_text("no directory")
    found = snapshots(MemoryStore(), tmp_path).newest_valid()
    assert found is not None and found.step == 10


def test_a_crash_at_any_write_of_an_upload_leaves_the_newest_or_the_one_before(tmp_path: Path):
    here = tmp_path

    def fresh() -> ObjectStore:
        nonlocal here
        here, store = tmp_path / uuid.uuid4().hex, MemoryStore()
        for step in (10, 20):
            snapshots(store, here).upload(take(here, step))
        return store

    def check(store: ObjectStore, operations: list[str]) -> None:
        found = snapshots(store, here.with_suffix(".other")).newest_valid()
        assert found is not None and found.step in (20, 30), operations
        snapshots(store, here).upload(here / snapshot_name(30, "a" * 16))
        assert stored_names(store) == [snapshot_name(step, "a" * 16) for step in (20, 30)]

    crashed = crash_everywhere(lambda store: snapshots(store, here).upload(take(here, 30)), fresh, check)
    assert crashed >= 8  # claim, two files, manifest; manifest, two files and claim of the one that goes


def committed(directory: Path) -> dict[str, object]:
    return {"event": "snapshot_committed", "stage": "cycle-1", "step": 1, "directory": str(directory)}


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("error", [StoreUnavailableError("gone"), AccessDeniedError("no"), OSError("disk")])
def test_an_outage_delays_nothing_is_warned_of_once_and_the_newest_go_up_when_it_is_over(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    down = True

    def before(key: str) -> None:
        if down:
            raise error

    store = Writes(before)
    with SnapshotUploader(snapshots(store, tmp_path), retry_seconds=(0.02,)) as uploader:
        for step in range(10, 60, 10):
            started = time.monotonic()
            uploader.hear(committed(take(tmp_path, step)))
            assert time.monotonic() - started < 1
            time.sleep(0.05)
        assert len(local_snapshots(tmp_path)) <= 3  # the last two, and one that is being read
        down = False
        wait_for(lambda: snapshot_name(50, "a" * 16) in stored_names(store))
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    assert "Training goes on" in caplog.text


def test_a_slow_upload_is_never_cut_by_newer_snapshots(tmp_path: Path):
    """The one being read stays on the disk however many come; then the newest follows."""
    go, entered = threading.Event(), threading.Event()

    def before(key: str) -> None:
        entered.set()
        go.wait(20)

    store = Writes(before)
    with SnapshotUploader(snapshots(store, tmp_path, keep=1)) as uploader:
        uploader.offer(take(tmp_path, 10))
        entered.wait(20)
        for step in (20, 30, 40):
            uploader.offer(take(tmp_path, step))
        assert sorted(local_snapshots(tmp_path)) == [snapshot_name(step, "a" * 16) for step in (10, 40)]
        go.set()
        wait_for(lambda: stored_names(store) == [snapshot_name(40, "a" * 16)])


def test_what_waits_is_stored_before_an_exception_goes_on(tmp_path: Path):
    store = Writes(lambda key: time.sleep(0.05))
    with pytest.raises(KeyboardInterrupt), SnapshotUploader(snapshots(store, tmp_path)) as uploader:
        uploader.hear(committed(take(tmp_path, 10)))
        raise KeyboardInterrupt
    assert stored_names(store) == [snapshot_name(10, "a" * 16)]


def test_a_dead_store_holds_an_exception_up_only_as_long_as_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("relora_train.runs.background.STOP_BUDGET_SECONDS", 0.5)

    def before(key: str) -> None:
        raise StoreUnavailableError("gone")

    started = time.monotonic()
    with pytest.raises(StorageError), SnapshotUploader(snapshots(Writes(before), tmp_path)) as uploader:
        uploader.hear({"event": "stopping", "seconds": 25})
        uploader.hear(committed(take(tmp_path, 10)))
        raise StorageError("stopped")
    assert time.monotonic() - started < 5
    assert "on this machine goes on from it" in caplog.text.replace("\n", " ")
    assert local_snapshots(tmp_path) == [snapshot_name(10, "a" * 16)]


def test_snapshots_wait_on_this_machine_until_they_may_be_stored(tmp_path: Path):
    store, may = MemoryStore(), threading.Event()
    held = snapshots(store, tmp_path)
    with SnapshotUploader(held, may_store=may.is_set) as uploader:
        for step in (10, 20, 30):
            uploader.offer(take(tmp_path, step))
        time.sleep(0.2)
        assert stored_names(store) == [] and len(local_snapshots(tmp_path)) == 2
        may.set()
        wait_for(lambda: held.newest_valid().stored)
    assert stored_names(store) == [snapshot_name(30, "a" * 16)]
    may.clear()
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), SnapshotUploader(held, may_store=may.is_set) as uploader:
        uploader.offer(take(tmp_path, 40))
        raise ZeroDivisionError  # a crash: the retry on this machine finds it here
    assert time.monotonic() - began < 2
    assert stored_names(store) == [snapshot_name(30, "a" * 16)]
    newest = snapshots(store, tmp_path).newest_valid(local_only=True)
    assert newest is not None and newest.step == 40 and not newest.stored
