"""One suite over every store: what ObjectStore promises holds for all of them, under races too."""

import hashlib
import multiprocessing
import string
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relora_train.checkpoints.manifest import hash_file
from relora_train.errors import CheckpointCorruptError, ObjectNotFoundError, PreconditionFailedError, StorageError
from relora_train.storage.base import ObjectStore, check_key
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store
from relora_train.storage.s3 import S3Store

BACKENDS = ("local", "memory", "s3")
LARGE_BYTES = 150_000_001  # three parts of 64 MB, the last one short


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_store_uri"))
    return open_store(tmp_path / "store" if request.param == "local" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture(params=("local", "s3"))
def shared_store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that several processes can open."""
    return request.getfixturevalue("s3_store_uri") if request.param == "s3" else str(tmp_path / "store")


def outcomes(actions: list[Callable[[], object]]) -> list[bool]:
    """Run all at the same moment; whether each was let through or met PreconditionFailedError."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], object]) -> bool:
        barrier.wait()
        try:
            action()
        except PreconditionFailedError:
            return False
        return True

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, actions))


def test_what_was_put_is_read_back_with_the_same_etag_everywhere(store):
    etag = store.put_bytes("a/b.json", b"content")
    assert store.get_bytes("a/b.json") == (b"content", etag)
    found = store.head("a/b.json")
    assert (found.key, found.size_bytes, found.etag) == ("a/b.json", 7, etag)
    assert abs(found.modified_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert list(store.list()) == [found]


def test_an_empty_object_is_an_object(store):
    store.put_bytes("empty", b"")
    assert store.get_bytes("empty")[0] == b""
    assert store.head("empty").size_bytes == 0


def test_what_is_read_whole_has_a_limit_and_files_have_none(store, tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(bytes(2001))
    store.put_file("large", tmp_path / "large")
    store.put_bytes("small", bytes(2000))
    monkeypatch.setattr("relora_train.storage.base.SMALL_OBJECT_BYTES", 2000)
    assert store.get_bytes("small")[0] == bytes(2000)
    with pytest.raises(CheckpointCorruptError, match=r"/large has 2,001 bytes.*at most 2,000"):
        store.get_bytes("large")
    store.get_file("large", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == bytes(2001)


def test_what_does_not_exist_is_said_so_by_name(store, tmp_path):
    with pytest.raises(ObjectNotFoundError, match="no/such"):
        store.get_bytes("no/such")
    with pytest.raises(ObjectNotFoundError, match="no/such"):
        store.get_file("no/such", tmp_path / "target")
    assert store.head("no/such") is None
    assert list(store.list("no/")) == []


def test_the_folder_of_an_object_is_not_an_object(store, tmp_path):
    store.put_bytes("a/b", b"1")
    with pytest.raises(ObjectNotFoundError):
        store.get_bytes("a")
    assert store.head("a") is None
    store.delete("a")
    assert store.get_bytes("a/b")[0] == b"1"


def test_a_put_replaces_unless_told_otherwise(store):
    store.put_bytes("key", b"one")
    second = store.put_bytes("key", b"two")
    assert store.get_bytes("key") == (b"two", second)


def test_if_absent_refuses_to_overwrite_even_with_the_same_bytes(store):
    store.put_bytes("key", b"same", if_absent=True)
    with pytest.raises(PreconditionFailedError, match="key"):
        store.put_bytes("key", b"same", if_absent=True)
    store.delete("key")
    store.put_bytes("key", b"new", if_absent=True)
    assert store.get_bytes("key")[0] == b"new"


def test_if_match_replaces_only_the_version_that_was_read(store):
    first = store.put_bytes("key", b"one")
    second = store.put_bytes("key", b"two", if_match=first)
    with pytest.raises(PreconditionFailedError, match="key"):
        store.put_bytes("key", b"three", if_match=first)
    assert store.get_bytes("key") == (b"two", second)


def test_if_match_on_an_absent_object_is_refused(store):
    etag = store.put_bytes("other", b"1")
    with pytest.raises(PreconditionFailedError, match="key"):
        store.put_bytes("key", b"1", if_match=etag)
    assert store.head("key") is None


def test_deleting_is_final_and_may_be_repeated(store):
    store.put_bytes("a/b/c", b"1")
    store.delete("a/b/c")
    store.delete("a/b/c")
    store.delete("never/was")
    assert store.head("a/b/c") is None
    assert list(store.list()) == []


def test_files_go_up_and_come_down_unchanged_and_replace(store, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for content in (b"first" * 1000, b"", b"second" * 50_000):
        source.write_bytes(content)
        store.put_file("dir/file.bin", source)
        assert store.head("dir/file.bin").size_bytes == len(content)
        store.get_file("dir/file.bin", target)
        assert target.read_bytes() == content


def test_preflight_passes_and_leaves_nothing_behind(store):
    store.preflight()
    store.preflight()
    assert list(store.list()) == []


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", ".hidden", "a/.hidden", "a b", "ä", "a\\b", "a\n", "a\0", "*"],
)
def test_a_key_that_could_leave_the_root_or_mean_two_things_is_refused(store, key, tmp_path):
    for use in (
        store.get_bytes,
        store.head,
        store.delete,
        store.local_path,
        lambda key: store.put_bytes(key, b""),
        lambda key: store.put_file(key, Path(__file__)),
        lambda key: store.get_file(key, tmp_path / "target"),
    ):
        with pytest.raises(StorageError, match="not a valid object key"):
            use(key)


KEYS = st.lists(
    st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=6).filter(lambda s: s[0] != "."),
    min_size=1,
    max_size=4,
).map("/".join)


@given(keys=st.lists(KEYS, min_size=1, max_size=12, unique_by=str.lower), prefix=st.text("ab-._/A1", max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_directory_lists_exactly_what_memory_lists(tmp_path, keys, prefix):
    folders = {key[:i].lower() for key in keys for i, c in enumerate(key) if c == "/"}
    local, memory = open_store(tmp_path / uuid.uuid4().hex), MemoryStore()
    for key in keys:
        if key.lower() not in folders:  # a name is a file or a folder on a disk
            check_key(key)
            local.put_bytes(key, key.encode())
            memory.put_bytes(key, key.encode())
    for wanted in (prefix, keys[0][: len(prefix)], keys[0]):
        listed = [info.key for info in local.list(wanted)]
        assert listed == [info.key for info in memory.list(wanted)] == sorted(listed)
        assert all(local.get_bytes(key)[0] == key.encode() for key in listed)


def test_listing_is_sorted_by_the_bytes_of_the_whole_key(store):
    keys = ["a-b", "a/b", "a.b", "a/b-c", "a0", "B", "a_b", "Z/z", "a/a/a", "10", "9"]
    for key in keys:
        store.put_bytes(key, b"")
    expected = sorted(keys, key=str.encode)
    assert [info.key for info in store.list()] == expected
    assert [info.key for info in store.list("a")] == [key for key in expected if key.startswith("a")]
    assert [info.key for info in store.list("a/")] == ["a/a/a", "a/b", "a/b-c"]
    assert [info.key for info in store.list("a/b")] == ["a/b", "a/b-c"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_listing_longer_than_a_page_is_complete(backend, tmp_path, request):
    if backend == "s3":
        bucket, _, prefix = request.getfixturevalue("s3_store_uri").removeprefix("s3://").partition("/")
        store, count = S3Store(bucket, prefix, page_size=7), 50
    else:
        store = open_store(tmp_path if backend == "local" else f"memory://{uuid.uuid4().hex}")
        count = 1100
    keys = [f"{i % 3}/{i:04d}" for i in range(count)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put_bytes(key, b""), keys))
    assert [info.key for info in store.list()] == sorted(keys)


def test_stores_below_one_bucket_or_directory_do_not_see_each_other(shared_store_uri):
    store = open_store(shared_store_uri)
    inner = open_store(f"{store.uri}/inner")
    inner.put_bytes("x", b"1")
    assert [info.key for info in store.list()] == ["inner/x"]
    assert list(open_store(f"{store.uri}/inn").list()) == []


def test_of_many_writers_that_want_it_absent_exactly_one_wins(store):
    for key in ("race/1", "race/2", "race/3"):
        bodies = [f"writer {i}".encode() for i in range(6)]
        won = outcomes([lambda k=key, b=body: store.put_bytes(k, b, if_absent=True) for body in bodies])
        assert sum(won) == 1
        assert store.get_bytes(key)[0] == bodies[won.index(True)]


def test_of_many_writers_with_the_same_etag_exactly_one_wins(store):
    etag = store.put_bytes("ref", b"start")
    for round_ in range(3):
        bodies = [f"round {round_} writer {i}".encode() for i in range(6)]
        won = outcomes([lambda b=body, e=etag: store.put_bytes("ref", b, if_match=e) for body in bodies])
        assert sum(won) == 1
        content, etag = store.get_bytes("ref")
        assert content == bodies[won.index(True)]


def increment(store: ObjectStore, times: int) -> None:
    for _ in range(times):
        while True:
            content, etag = store.get_bytes("counter")
            try:
                store.put_bytes("counter", f"{int(content.split()[0]) + 1} {uuid.uuid4()}".encode(), if_match=etag)
                break
            except PreconditionFailedError:
                continue


def test_no_increment_of_a_counter_is_lost_between_threads(store):
    store.put_bytes("counter", b"0 start")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: increment(store, 10), range(4)))
    assert store.get_bytes("counter")[0].split()[0] == b"40"


def increment_in_a_process(uri: str, times: int) -> None:
    increment(open_store(uri), times)


def create_in_a_process(uri: str, me: int, keys: list[str]) -> list[str]:
    store = open_store(uri)
    won = []
    for key in keys:
        try:
            store.put_bytes(key, f"{me} {uuid.uuid4()}".encode() * 100, if_absent=True)
            won.append(key)
        except PreconditionFailedError:
            assert len(store.get_bytes(key)[0]) % 100 == 0, "a partial object was visible"
    return won


def test_conditions_hold_between_processes(shared_store_uri):
    store = open_store(shared_store_uri)
    store.put_bytes("counter", b"0 start")
    keys = [f"once/{i}" for i in range(10)]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        increments = pool.starmap_async(increment_in_a_process, [(shared_store_uri, 5)] * 4)
        won = pool.starmap(create_in_a_process, [(shared_store_uri, me, keys) for me in range(4)], chunksize=1)
        increments.get()
        pool.close()
        pool.join()
    assert sorted(key for each in won for key in each) == keys
    assert store.get_bytes("counter")[0].split()[0] == b"20"


def test_readers_see_a_whole_object_or_none_while_it_is_replaced(store, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"s" * 1000)
    large.write_bytes(b"l" * 3_000_000)
    store.put_file("key", small)
    done = threading.Event()

    def keep_replacing():
        for _ in range(10):
            store.put_file("key", large)
            store.put_file("key", small)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(keep_replacing)
        while not done.is_set():
            content, _ = store.get_bytes("key")
            assert content in (b"s" * 1000, b"l" * 3_000_000)
        writer.result()


def test_a_file_of_several_parts_goes_up_and_comes_down_whole_in_bounded_memory(shared_store_uri, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    write_noise(source, LARGE_BYTES)
    script = (
        "import resource, sys; from pathlib import Path; from relora_train.storage.opening import open_store\n"
        "store = open_store(sys.argv[1]); store.put_bytes('warm', b'')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "store.put_file('large.bin', Path(sys.argv[2])); store.get_file('large.bin', Path(sys.argv[3]))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    command = [sys.executable, "-c", script, shared_store_uri, str(source), str(target)]
    extra_bytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert hash_file(target) == hash_file(source)
    assert open_store(shared_store_uri).head("large.bin").size_bytes == LARGE_BYTES
    assert extra_bytes < 100e6  # 9 MB up and 56 MB down were measured for boto3; the file is 150 MB


def write_noise(path: Path, size_bytes: int) -> None:
    block = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(256))
    with path.open("wb") as stream:
        while (left := size_bytes - stream.tell()) > 0:
            stream.write(block[:left])


def test_a_directory_shows_no_temporary_files_and_keeps_none(tmp_path):
    store = open_store(tmp_path / "store")
    store.put_bytes("a/b", b"1", if_absent=True)
    with pytest.raises(PreconditionFailedError):
        store.put_bytes("a/b", b"2", if_absent=True)
    with pytest.raises(FileNotFoundError):
        store.put_file("a/c", tmp_path / "absent")
    left = sorted(p.relative_to(tmp_path / "store").as_posix() for p in (tmp_path / "store").rglob("*"))
    assert left == [".lock", "a", "a/b"]
    (tmp_path / "store/a/.tmp-left-by-a-kill").write_bytes(b"")
    assert [info.key for info in store.list()] == ["a/b"]


def test_a_directory_is_made_by_the_first_write_and_read_as_empty_before(tmp_path):
    store = open_store(tmp_path / "not/there/yet")
    assert list(store.list()) == []
    assert store.head("a") is None
    store.delete("a")
    assert not (tmp_path / "not").exists()
    store.put_bytes("a", b"1")
    assert store.local_path("a").read_bytes() == b"1"


def test_files_in_a_directory_get_the_mode_that_the_umask_allows(tmp_path):
    program = (
        "import os, sys; os.umask(0o027); from relora_train.storage.opening import open_store\n"
        "open_store(sys.argv[1]).put_bytes('a', b'1')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "store")], check=True)
    assert (tmp_path / "store/a").stat().st_mode & 0o777 == 0o640


def test_deleting_in_a_directory_leaves_no_empty_folders_and_disturbs_no_writer(tmp_path):
    store = open_store(tmp_path)

    def write_and_delete(worker: int) -> None:
        for i in range(50):
            store.put_bytes(f"deep/er/{worker}-{i}", b"1")
            store.delete(f"deep/er/{worker}-{i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_delete, range(4)))
    assert not (tmp_path / "deep").exists()


def test_one_name_cannot_be_a_file_and_a_folder_in_a_directory(tmp_path):
    store = open_store(tmp_path)
    store.put_bytes("a", b"1")
    with pytest.raises(StorageError, match="file and a folder"):
        store.put_bytes("a/b", b"1")


def test_the_two_sides_of_a_write_agree_on_the_etag_of_a_large_object(tmp_path):
    store = open_store(tmp_path)
    etag = store.put_bytes("large", b"x" * 100_000)
    assert store.get_bytes("large")[1] == store.head("large").etag == etag
    newer = store.put_bytes("large", b"y" * 100_000, if_match=etag)
    with pytest.raises(PreconditionFailedError):
        store.put_bytes("large", b"z", if_match=etag)
    assert store.head("large").etag == newer


def test_names_that_are_no_keys_are_not_listed(s3_store_uri, seaweed, tmp_path):
    """A console makes 'folder/' objects and people upload 'my file': no call could read those."""
    bucket = s3_store_uri.split("/")[2]
    client = seaweed.client()
    for name in ("some/prefix/my file", "some/prefix/.hidden", "some/prefix/good"):
        client.put_object(Bucket=bucket, Key=name, Body=b"")
    client.close()
    (tmp_path / "my file").write_bytes(b"")
    (tmp_path / "good").write_bytes(b"")
    for store in (open_store(s3_store_uri), open_store(tmp_path)):
        assert [info.key for info in store.list()] == ["good"]


def test_half_uploads_are_named_and_removed_by_age_and_prefix_and_objects_stay(store, tmp_path, request):
    keys = ("a/b/one", "a/c/two", "ab/three")
    for key in keys:
        store.put_bytes(key, b"1")
    begin_uploads(store, [f"{key}-half" for key in keys], request, tmp_path)
    count = 0 if isinstance(store, MemoryStore) else 1
    old, young = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=1)
    assert list(store.abort_stale_uploads(old)) == []
    assert len(store.abort_stale_uploads(young, dry_run=True)) == 3 * count
    assert len(store.abort_stale_uploads(young, prefix="a/b/")) == count
    assert len(store.abort_stale_uploads(young, prefix="a/")) == count
    assert len(store.abort_stale_uploads(young)) == count
    assert list(store.abort_stale_uploads(young)) == []
    assert [info.key for info in store.list()] == list(keys)


def begin_uploads(store: ObjectStore, keys: list[str], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """What a writer killed in mid-upload leaves."""
    if isinstance(store, S3Store):
        client = request.getfixturevalue("seaweed").client()
        bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
        for key in keys:
            client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")
        client.close()
    elif not isinstance(store, MemoryStore):
        for index, key in enumerate(keys):
            ((tmp_path / "store" / key).parent / f".tmp-{index:016x}").touch()
