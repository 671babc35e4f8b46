"""Writers of one bundle that race or crash: what is visible is whole and never changes."""

import hashlib
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import FILES, checkpoint_manifest, write_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bundle import PREFIX, committed, contents

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.fetch import fetch_bundle, verify_bundle
from relora_train.checkpoints.manifest import CheckpointManifest, describe_files, read_manifest
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store


@pytest.fixture(params=("local", "s3"))
def shared_store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_store_uri") if request.param == "s3" else str(tmp_path / "store")


STOP_BEFORE = """
import os, signal, sys
from pathlib import Path
from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.storage.opening import open_store
uri, prefix, directory, manifest, writes_allowed = sys.argv[1:]
store, left = open_store(uri), int(writes_allowed)
def stop_before(write):
    def counted(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return write(*args, **kwargs)
    return counted
store.put_bytes, store.put_file = stop_before(store.put_bytes), stop_before(store.put_file)
commit_bundle(store, prefix, Path(directory), CheckpointManifest.model_validate_json(Path(manifest).read_bytes()))
"""


WRITES = 1 + len(FILES) + 1  # the claim, the files, the manifest


def commit_and_be_killed(uri: str, directory: Path, manifest: CheckpointManifest, writes_allowed: int) -> int:
    written = directory.parent / f"{manifest.attempt}.json"
    written.write_bytes(manifest.to_bytes())
    command = [sys.executable, "-c", STOP_BEFORE, uri, PREFIX, str(directory), str(written), str(writes_allowed)]
    return subprocess.run(command).returncode


@pytest.mark.parametrize("retry_seed", ["a", "b"])
@pytest.mark.parametrize("writes", [1, 2, WRITES - 1])
def test_a_writer_killed_before_its_manifest_is_invisible_and_a_retry_completes(
    shared_store_uri, tmp_path, writes, retry_seed
):
    store = open_store(shared_store_uri)
    manifest = checkpoint_manifest(write_files(tmp_path / "a", "a"))
    assert commit_and_be_killed(shared_store_uri, tmp_path / "a", manifest, writes) == -signal.SIGKILL
    assert len(list(store.list(PREFIX))) == writes
    assert read_manifest(store, PREFIX, CheckpointManifest) is None
    final = committed(store, tmp_path / "retry", retry_seed)
    verify_bundle(store, PREFIX, final)
    fetched = fetch_bundle(store, PREFIX, final, tmp_path / "cache")
    assert contents(fetched) == contents(tmp_path / "retry")
    assert (final.files_prefix == "") == (retry_seed == "a")


def test_a_writer_killed_after_its_manifest_has_committed(shared_store_uri, tmp_path):
    manifest = checkpoint_manifest(write_files(tmp_path / "a", "a"))
    assert commit_and_be_killed(shared_store_uri, tmp_path / "a", manifest, WRITES) == 0
    assert committed(open_store(shared_store_uri), tmp_path / "b", "b") == manifest


def test_of_two_writers_with_different_bytes_one_wins_and_all_its_files_verify(store, tmp_path):
    seeds = ("a", "b", "c")
    for round_ in range(3):
        prefix = f"{PREFIX}{round_}"
        barrier = threading.Barrier(len(seeds))

        def commit(seed: str, prefix: str = prefix, barrier: threading.Barrier = barrier) -> CheckpointManifest:
            directory = write_files(tmp_path / prefix / seed, seed)
            manifest = checkpoint_manifest(directory)
            barrier.wait()
            return commit_bundle(store, prefix, directory, manifest)

        with ThreadPoolExecutor(len(seeds)) as pool:
            results = list(pool.map(commit, seeds))
        assert results[0] == results[1] == results[2] == read_manifest(store, prefix, CheckpointManifest)
        verify_bundle(store, prefix, results[0])
        files = {f"{prefix}/{results[0].files_prefix}/{name}".replace("//", "/") for name in FILES}
        left = {info.key for info in store.list(f"{prefix}/")}
        assert left == files | {f"{prefix}/manifest.json", f"{prefix}/claim.json"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class TakingTurns:
    """Lets threads do one store operation each when it is their turn, so that a test chooses the interleaving."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.turn: int | None = None
        self.alive: set[int] = set()
        self.is_over = False

    def wait(self, me: int) -> None:
        with self.changed:
            if self.turn == me:  # my operation is done
                self.turn = None
                self.changed.notify_all()
            self.changed.wait_for(lambda: self.turn == me or self.is_over)
            if self.is_over:
                raise Killed

    def leave(self, me: int) -> None:
        with self.changed:
            self.alive.discard(me)
            if self.turn == me:
                self.turn = None
            self.changed.notify_all()

    def end(self) -> None:
        """Let nobody wait any longer, also when the test has failed."""
        with self.changed:
            self.is_over = True
            self.changed.notify_all()

    def let(self, who: int) -> None:
        """One operation of one writer, from start to end."""
        with self.changed:
            if who in self.alive:
                self.turn = who
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.turn is None)


class SteppedStore:
    """One writer's view of a store: each operation waits for its turn, and one of them may be the writer's last."""

    def __init__(self, store: MemoryStore, turns: TakingTurns, me: int, operations: int) -> None:
        self.store, self.turns, self.me, self.left = store, turns, me, operations
        self.uri = store.uri

    def local_path(self, key: str) -> None:
        return None

    def __getattr__(self, name: str):
        operation = getattr(self.store, name)

        def stepped(*args, **kwargs):
            self.turns.wait(self.me)
            if self.left == 0:
                raise Killed
            self.left -= 1
            return operation(*args, **kwargs)

        return stepped


@given(
    seeds=st.lists(st.sampled_from("abc"), min_size=2, max_size=3),
    lives=st.lists(st.integers(0, 30), min_size=3, max_size=3),
    schedule=st.lists(st.integers(0, 2), max_size=60),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_any_interleaving_with_any_crashes_what_is_visible_is_whole_and_never_changes(
    tmp_path, seeds, lives, schedule
):
    store, turns, results = MemoryStore(), TakingTurns(), {}
    directories = [tmp_path / seed for seed in seeds]
    for directory in directories:
        if not directory.exists():
            write_files(directory, directory.name)

    def write(me: int) -> None:
        try:
            stepped = SteppedStore(store, turns, me, lives[me])
            results[me] = commit_bundle(stepped, PREFIX, directories[me], checkpoint_manifest(directories[me]))
        except Killed:
            pass
        finally:
            turns.leave(me)

    threads = [threading.Thread(target=write, args=(me,)) for me in range(len(seeds))]
    turns.alive = set(range(len(seeds)))
    for thread in threads:
        thread.start()
    first_seen = None
    to_the_end = [me for me in range(len(seeds)) for _ in range(60)]
    try:
        for who in [*(who % len(seeds) for who in schedule), *to_the_end]:
            turns.let(who)
            visible = read_manifest(store, PREFIX, CheckpointManifest)
            if visible is not None:
                assert_whole(store, visible)
                first_seen = first_seen or visible
            assert visible == first_seen
        assert not turns.alive
    finally:
        turns.end()
        for thread in threads:
            thread.join()
    assert all(result == first_seen for result in results.values())
    retried = commit_bundle(store, PREFIX, directories[0], checkpoint_manifest(directories[0]))
    assert first_seen in (None, retried)
    assert_whole(store, retried)


def assert_whole(store: MemoryStore, manifest: CheckpointManifest) -> None:
    for entry in manifest.files:
        key = "/".join(part for part in (PREFIX, manifest.files_prefix, entry.path) if part)
        assert hashlib.sha256(store.get_bytes(key)[0]).hexdigest() == entry.sha256, key


def test_a_variant_is_a_whole_directory_and_nothing_uncommitted_stays_loadable(tmp_path):
    store = open_store(tmp_path / "store")
    manifest = checkpoint_manifest(write_files(tmp_path / "a", "a"))
    assert commit_and_be_killed(store.uri, tmp_path / "a", manifest, WRITES - 1) == -signal.SIGKILL
    final = committed(store, tmp_path / "b", "b")
    in_place = fetch_bundle(store, PREFIX, final, tmp_path / "cache")
    assert in_place == tmp_path / "store" / PREFIX / final.files_prefix
    assert describe_files(in_place) == final.files
    assert not (tmp_path / "store" / PREFIX / "model.safetensors").exists()
    # The writer that was thought dead comes back and finds what happened.
    assert commit_bundle(store, PREFIX, tmp_path / "a", manifest) == final
