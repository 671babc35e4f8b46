"""Compare a file on this machine with its entry in a manifest.

Reading gigabytes again at every stage would be waste. On request a file is not read again if this process found it
sound before and its size, times and inode have not changed since. A file written within the last seconds is not
remembered: a second write in the same tick of the file system's clock could not be told from it.
"""

from __future__ import annotations

import time
from pathlib import Path

from relora_train.checkpoints.manifest import FileEntry, hash_file
from relora_train.errors import CheckpointCorruptError, CheckpointIncompleteError

_SETTLED_SECONDS = 2.0
_Seen = tuple[int, int, int, int, int]
_sound: dict[tuple[Path, str], _Seen] = {}


def check_file(path: Path, entry: FileEntry, *, uri: str, unless_checked_before: bool = False) -> None:
    """Return only if the file is as the manifest says; else CheckpointIncompleteError or CheckpointCorruptError."""
    if not path.is_file():
        raise missing_file(uri)
    found_bytes = path.stat().st_size
    if found_bytes != entry.size_bytes:
        expected, found = f"{entry.size_bytes} bytes", f"{found_bytes} bytes"
    else:
        expected, found = f"SHA-256 {entry.sha256}", f"SHA-256 {_digest(path, entry, unless_checked_before)}"
    if expected != found:
        raise CheckpointCorruptError(
            f"{uri} is damaged: its manifest says {expected}, found {found}. It is not used. "
            "Use another checkpoint, or delete the whole prefix and make it again."
        )


def is_intact(path: Path, entry: FileEntry, *, unless_checked_before: bool = False) -> bool:
    """Return True if the file is there and as the manifest says."""
    if not path.is_file() or path.stat().st_size != entry.size_bytes:
        return False
    return _digest(path, entry, unless_checked_before) == entry.sha256


def missing_file(uri: str) -> CheckpointIncompleteError:
    """Return the error for a file that a manifest lists and that is not there."""
    return CheckpointIncompleteError(
        f"{uri} is listed in its manifest but is not there. "
        "Use another checkpoint, or delete the whole prefix and make it again."
    )


def _digest(path: Path, entry: FileEntry, unless_checked_before: bool) -> str:
    key, before = (path.absolute(), entry.sha256), _seen(path)
    if unless_checked_before and _sound.get(key) == before:
        return entry.sha256
    digest = hash_file(path)
    is_settled = max(before[1:3]) / 1e9 < time.time() - _SETTLED_SECONDS
    if digest == entry.sha256 and is_settled and _seen(path) == before:
        _sound[key] = before
    return digest


def _seen(path: Path) -> _Seen:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev
