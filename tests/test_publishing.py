"""Checkpoints stored beside the training of later stages: in order, again after a fault, never after their flow."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from bundles import checkpoint_manifest, fingerprint_of, write_files
from stage_runs import stage_request, tiny_profile

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import RECORD_FILES, result_digest
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import AccessDeniedError, DiskFullError, PreconditionFailedError, StoreUnavailableError
from relora_train.runs.publishing import Publication, Publisher
from relora_train.runs.run import Run, fetch_parent, session
from relora_train.runs.train import left_output, remove_leftover_work, work_name
from relora_train.settings.profile import Profile
from relora_train.storage.memory import MemoryStore
from relora_train.storage.workspace import WorkDirectory, checkpoint_cache, keep_work_from


class Shaky(MemoryStore):
    """A store that holds up every upload until its gate is open, and then fails as often as it is told."""

    def __init__(self) -> None:
        super().__init__("shaky")
        self.gate, self.faults = threading.Event(), list[Exception]()
        self.gate.set()

    def put_file(self, key: str, path: Path) -> None:
        assert self.gate.wait(timeout=30)
        if self.faults:
            raise self.faults.pop(0)
        super().put_file(key, path)


@pytest.fixture
def shaky() -> Iterator[Shaky]:
    store = Shaky()
    yield store
    store.gate.set()


class Flow:
    """Finished stages of a run, handed over as train_stage does."""

    def __init__(self, store: MemoryStore, directory: Path) -> None:
        self.store, self.directory, self.run = store, directory, CheckpointStore(store, "run")
        self.finished: list[tuple[str, bool]] = []
        self.cancelled: list[str] = []

    def made(self, stage: str, step: int, *, seed: str = "") -> Publication:
        directory = write_files(self.directory / f"{stage}{seed}", f"{stage}{seed}")
        manifest = checkpoint_manifest(directory, step=step, stage=stage, work=stage)
        return Publication(
            self.run.place_of(manifest),
            directory,
            store=lambda permit: self.run.commit(directory, manifest, check_lease=permit),
            cancel=lambda: self.cancelled.append(stage),
            finish=lambda committed: self.finished.append((stage, committed is not None)),
        )

    @property
    def committed(self) -> list[str]:
        return [ref.manifest.stage for ref in self.run.list()]


@pytest.fixture
def flow(shaky: Shaky, tmp_path: Path) -> Flow:
    return Flow(shaky, tmp_path)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def offered(publisher: Publisher, *publications: Publication) -> list[CheckpointRef]:
    for publication in publications:
        publisher.offer(publication)
    return [publication.checkpoint for publication in publications]


class Anything:
    """A lease of a store that is not there."""

    raise_if_lost = None


def test_only_a_store_beyond_this_machine_has_a_publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("hold_run", "RunReporter"):  # the remote store is not there
        monkeypatch.setattr(f"relora_train.runs.run.{name}", lambda *_, **__: nullcontext(Anything()))
    for uri, remote in ((tmp_path.as_uri(), False), ("memory://x", False), ("s3://bucket/x", True)):
        with session(Run("run", uri, Profile())) as run:
            assert run.publisher.has_started is remote


def test_what_is_handed_over_is_stored_while_others_work_and_kept_until_nobody_reads_it(flow: Flow, shaky: Shaky):
    shaky.gate.clear()
    with Publisher() as publisher:
        (one,) = offered(publisher, flow.made("one", 1))
        assert not publisher.is_stored(one) and publisher.find(one.fingerprint).directory.is_dir()
        shaky.gate.set()
        assert publisher.wait(one).manifest == flow.run.list()[0].manifest
        assert publisher.is_stored(one) and flow.finished == []
        publisher.release_files(one)
        assert flow.finished == [("one", True)] and publisher.find(one.fingerprint) is None
        assert publisher.wait(one) == one  # as any checkpoint of the store


def test_what_cannot_be_stored_holds_up_all_that_came_after_it(flow: Flow, shaky: Shaky):
    shaky.faults = [DiskFullError("no"), DiskFullError("still no")]
    with pytest.raises(DiskFullError, match="still no"), Publisher() as publisher:
        one, two = offered(publisher, flow.made("one", 1), flow.made("two", 2))
        until(lambda: not shaky.faults[1:])
        publisher.release_files(one)  # too early: it is not stored
        publisher.wait(two)
    assert flow.committed == []
    assert flow.finished == [("one", False), ("two", False)]


def test_a_store_that_comes_back_is_found_by_who_waits_and_by_nobody_waiting(flow: Flow, shaky: Shaky):
    shaky.faults = [StoreUnavailableError("away") for _ in range(5)]
    with Publisher(retry_seconds=(0.01,)) as publisher:
        _, two = offered(publisher, flow.made("one", 1), flow.made("two", 2))
        until(lambda: publisher.is_stored(two))
        assert shaky.faults == [] and flow.committed == ["one", "two"]
    shaky.faults = [DiskFullError("no")]
    with Publisher() as publisher:
        (three,) = offered(publisher, flow.made("three", 3))
        until(lambda: not shaky.faults)
        time.sleep(0.05)
        assert not publisher.is_stored(three)  # nothing is tried again that waiting does not mend
        with pytest.raises(DiskFullError):
            shaky.faults = [DiskFullError("no")]
            publisher.wait(three)
        publisher.wait(three)
    assert flow.committed == ["one", "two", "three"]


def test_denied_access_is_waited_out_by_who_waits_and_by_nobody_waiting(
    flow: Flow, shaky: Shaky, caplog: pytest.LogCaptureFixture
):
    shaky.faults = [StoreUnavailableError("away"), *(AccessDeniedError("no") for _ in range(4))]
    with Publisher(retry_seconds=(0.01,)) as publisher:
        (one,) = offered(publisher, flow.made("one", 1))
        until(lambda: publisher.is_stored(one))
        shaky.gate.clear()
        shaky.faults = [AccessDeniedError("no") for _ in range(4)]
        (two,) = offered(publisher, flow.made("two", 2))
        threading.Timer(0.1, shaky.gate.set).start()
        publisher.wait(two)
    assert shaky.faults == [] and flow.committed == ["one", "two"]
    told = [record.message for record in caplog.records if "Renew the credentials in the file" in record.message]
    assert len(told) == 2 and "until 2" in told[0] and "it waits on this machine" in told[0].lower()


@pytest.mark.timeout(60)
def test_denied_access_ends_a_flow_that_waits_when_its_time_is_over_and_not_one_that_trains(
    flow: Flow, shaky: Shaky, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("relora_train.runs.publishing._DENIED_SECONDS", 0.5)
    denials = [AccessDeniedError(f"no {n}") for n in range(1000)]
    shaky.faults = list(denials)
    began = time.monotonic()
    with Publisher(retry_seconds=(0.01, 3600.0)) as publisher:
        (one,) = offered(publisher, flow.made("one", 1))
        until(lambda: len(shaky.faults) < 999)
        with pytest.raises(AccessDeniedError) as caught:
            publisher.wait(one)
        assert time.monotonic() - began >= 0.5
        assert caught.value is denials[-len(shaky.faults) - 1]  # of an attempt at the very end, not an hour after it
        with pytest.raises(AccessDeniedError):
            publisher.wait(one)  # at once
        publisher._retry_seconds = (0.01,)
        with pytest.raises(AccessDeniedError):
            publisher.wait(one)
        shaky.faults = denials[:3]
        until(lambda: publisher.is_stored(one))
    assert flow.committed == ["one"]


def test_a_flow_that_ends_for_another_reason_waits_for_no_access(flow: Flow, shaky: Shaky):
    shaky.faults = [AccessDeniedError("no")]
    with pytest.raises(ZeroDivisionError), Publisher() as publisher:
        offered(publisher, flow.made("one", 1))
        until(lambda: not shaky.faults)
        raise ZeroDivisionError
    assert flow.finished == [("one", False)]


def test_another_result_in_its_place_ends_all_that_was_made_from_it(flow: Flow, shaky: Shaky):
    theirs = flow.made("one", 1, seed="other")
    theirs.store(lambda: None)
    with Publisher() as publisher:
        one, two = offered(publisher, flow.made("one", 1), flow.made("two", 2))
        for _ in range(2):
            with pytest.raises(PreconditionFailedError, match="Run the same command again"):
                publisher.wait(one)
        with pytest.raises(PreconditionFailedError):
            publisher.wait(two)
        with pytest.raises(PreconditionFailedError):
            publisher.raise_if_superseded()
        assert not publisher.is_stored(one)
    assert flow.committed == ["one"]
    assert flow.finished == [("one", True), ("two", False)]


def test_other_timings_are_no_other_result(tmp_path: Path):
    digests = []
    for name in ("a", "b"):
        directory = write_files(tmp_path / name, "same")
        for record in RECORD_FILES:
            (directory / record).write_text(name)
        digests.append(result_digest(checkpoint_manifest(directory)))
    assert digests[0] == digests[1]
    (directory / "model.safetensors").write_bytes(b"other")
    assert result_digest(checkpoint_manifest(directory)) != digests[0]


def test_a_stopped_flow_leaves_in_bounded_time_and_nothing_becomes_visible_after_it(
    flow: Flow, shaky: Shaky, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("relora_train.runs.background.STOP_BUDGET_SECONDS", 1.0)
    shaky.gate.clear()
    with pytest.raises(KeyboardInterrupt), Publisher() as publisher:
        offered(publisher, flow.made("one", 1), flow.made("two", 2))
        threading.Timer(0.2, publisher.stopping).start()
        time.sleep(0.3)
        left = time.monotonic()
        raise KeyboardInterrupt
    assert 0.5 < time.monotonic() - left < 5
    assert flow.finished == [("one", False), ("two", False)]
    assert flow.cancelled == ["one", "two"]
    assert "stores it without training it again" in caplog.text
    shaky.gate.set()
    until(lambda: not publisher._thread.is_alive())
    assert flow.committed == []


def test_a_flow_that_fails_waits_for_what_is_under_way(flow: Flow, shaky: Shaky):
    shaky.gate.clear()
    threading.Timer(0.3, shaky.gate.set).start()
    with pytest.raises(ZeroDivisionError), Publisher() as publisher:
        offered(publisher, flow.made("one", 1), flow.made("two", 2))
        raise ZeroDivisionError
    assert flow.committed == ["one", "two"]


def test_a_lease_lost_during_the_upload_keeps_the_checkpoint_invisible(memory: MemoryStore, tmp_path: Path):
    def lost() -> None:
        raise PreconditionFailedError("taken over")

    directory = write_files(tmp_path / "files", "a")
    manifest = checkpoint_manifest(directory)
    for files_before in range(len(manifest.files) + 1):
        asked = iter([True] * files_before)
        with pytest.raises(PreconditionFailedError, match="taken over"):
            commit_bundle(
                memory, "place", directory, manifest, check_lease=lambda asked=asked: next(asked, None) or lost()
            )
        assert "place/manifest.json" not in {info.key for info in memory.list()}
    assert commit_bundle(memory, "place", directory, manifest) == manifest


def test_work_that_began_from_other_bytes_is_dropped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path))
    work = WorkDirectory("run", "stage")
    write_files(work.path / "checkpoint", "a")
    assert keep_work_from(work.path, "a" * 64)  # of a version that had no memory of it
    assert keep_work_from(work.path, "a" * 64) and (work.path / "checkpoint").is_dir()
    assert not keep_work_from(work.path, "b" * 64)
    assert [path.name for path in work.path.iterdir()] == ["origin"]
    assert keep_work_from(work.path, "b" * 64)
    work.release(remove=False)
    again = WorkDirectory.left_over("run", "stage")  # the lock was let go of
    assert again is not None and WorkDirectory.left_over("run", "stage") is None
    again.release(remove=True)
    work.release(remove=True)  # long over
    assert not work.path.exists()


def test_what_a_flow_left_that_was_killed_after_it_had_stored_spares_a_download_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path))
    run = Run("run", "memory://left", tiny_profile())
    work = WorkDirectory(*work_name(run, "one", fingerprint_of("one")))
    files = write_files(work.path / "checkpoint", "one")
    manifest = checkpoint_manifest(files, step=1, stage="one", work="one")
    (files / "manifest.json").write_bytes(manifest.to_bytes())
    committed = run.checkpoints.commit(files, manifest)
    remove_leftover_work(run, committed)  # somebody is still at work there
    assert work.path.is_dir()
    work.release(remove=False)
    remove_leftover_work(run, committed)
    assert not work.path.exists()
    (kept,) = checkpoint_cache("run").iterdir()
    assert kept == fetch_parent(committed) and (kept / "model.safetensors").stat().st_size == 5000
    remove_leftover_work(run, committed)


def test_a_checkpoint_that_a_power_cut_damaged_before_it_was_stored_is_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    request = stage_request(tiny_profile(), "warm-start", tmp_path, tmp_path / "output")
    assert left_output(request) is None
    files = write_files(request.output_directory, "one")
    manifest = checkpoint_manifest(files).model_copy(update={"fingerprint": request.fingerprint})
    (files / "manifest.json").write_bytes(manifest.to_bytes())
    assert left_output(request) == manifest
    (files / "model.safetensors").write_bytes(bytes(5000))
    assert left_output(request) is None and not files.exists()
    assert "the stage is finished again" in caplog.text
