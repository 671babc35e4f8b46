"""A file that was found sound is not read twice by one process, and a change of it never goes unseen."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relora_train.checkpoints import fetch
from relora_train.checkpoints.fetch import check_file, is_intact
from relora_train.checkpoints.manifest import FileEntry, hash_file
from relora_train.errors import CheckpointCorruptError, CheckpointIncompleteError

CONTENT = b"tokens"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were hashed."""
    seen: list[Path] = []

    def counted(path: Path) -> str:
        seen.append(path)
        return hash_file(path)

    monkeypatch.setattr(fetch, "hash_file", counted)
    return seen


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, FileEntry]]:
    """A file, the entry that describes it, and a clock by which it was written a minute ago."""
    path = tmp_path / "shard.bin"
    path.write_bytes(CONTENT)
    yield path, FileEntry(path=path.name, size_bytes=len(CONTENT), sha256=hash_file(path))


def a_minute_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time() + 60
    monkeypatch.setattr(fetch.time, "time", lambda: now)


def test_a_settled_file_is_read_once(file, reads, monkeypatch):
    a_minute_later(monkeypatch)
    for _ in range(3):
        check_file(*file, uri="x", unless_checked_before=True)
        assert is_intact(*file, unless_checked_before=True)
    assert len(reads) == 1


def test_who_asks_for_a_real_look_gets_one(file, reads, monkeypatch):
    a_minute_later(monkeypatch)
    for _ in range(3):
        check_file(*file, uri="x")
    assert len(reads) == 3


def test_a_file_of_this_moment_is_read_each_time(file, reads):
    for _ in range(3):
        check_file(*file, uri="x", unless_checked_before=True)
    assert len(reads) == 3


@pytest.mark.parametrize("keep_times", [False, True])
def test_other_bytes_of_the_same_size_are_seen(keep_times, file, monkeypatch):
    path, entry = file
    a_minute_later(monkeypatch)
    check_file(path, entry, uri="x", unless_checked_before=True)
    stat = path.stat()
    time.sleep(0.02)  # more than a tick of the file system's clock
    path.write_bytes(CONTENT[::-1])
    if keep_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not is_intact(path, entry, unless_checked_before=True)
    with pytest.raises(CheckpointCorruptError, match="x is damaged"):
        check_file(path, entry, uri="x", unless_checked_before=True)


def test_a_file_that_is_gone_is_missing(file, monkeypatch):
    path, entry = file
    a_minute_later(monkeypatch)
    check_file(path, entry, uri="x", unless_checked_before=True)
    path.unlink()
    assert not is_intact(path, entry, unless_checked_before=True)
    with pytest.raises(CheckpointIncompleteError, match="x is listed"):
        check_file(path, entry, uri="x", unless_checked_before=True)
