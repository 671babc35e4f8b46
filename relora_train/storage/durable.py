"""Files that are there completely or not at all, also after a kill or a power cut; locks on them, and their errors."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relora_train.errors import AccessDeniedError, DiskFullError, StorageError


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees all of it or what was there before."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    replace_durably(part, path)


def replace_durably(part: Path, target: Path) -> None:
    """Give a finished temporary file, in the same directory, its name."""
    sync(part)
    part.replace(target)
    sync(target.parent)


def sync_all(directory: Path) -> None:
    """Bring a directory with all that is below it onto the disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
    sync(directory.parent)


def sync(path: Path) -> None:
    """Bring what was written to a file, or the names in a directory, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file for the length of the block; the kernel frees that of a killed process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def disk_error(error: OSError, action: str) -> StorageError:
    """Return an error for each thing a user can do about it. `action` completes "Cannot ...", with the path."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(f"Cannot {action}: {reason}. Free some space or use another directory, then run again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDeniedError(
            f"Cannot {action}: {reason}. Let this user (uid {os.getuid()}) write there or use another directory."
        )
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return StorageError(
            f"Cannot {action}: {reason}. In a directory no name can be a file and a folder; rename or remove one."
        )
    return StorageError(f"Cannot {action}: {reason}.")
