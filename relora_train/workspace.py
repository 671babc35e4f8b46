"""Scratch space on this machine. Nothing in it is needed to resume: a store holds all that counts. Light."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from relora_train.errors import TrainerCrashedError
from relora_train.storage.os_errors import disk_error

_LOGGER = logging.getLogger(__name__)

CACHE_VARIABLE = "RELORA_CACHE"
_ORPHAN_SECONDS = 30.0


def cache_root() -> Path:
    """$RELORA_CACHE, else relora-train below the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").expanduser().resolve() / "relora-train"


def checkpoint_cache(run_id: str) -> Path:
    """Where checkpoints of stores that are not a local directory are downloaded to."""
    return cache_root() / "checkpoints" / run_id


def dataset_cache(dataset_id: str) -> Path:
    """Where a dataset is downloaded to."""
    return cache_root() / "datasets" / dataset_id[:16]


@contextmanager
def work_directory(*names: str) -> Iterator[Path]:
    """A directory of this name for one process at a time; removed when the work ended well, kept when it failed.

    While another live process of this machine holds it, waits: look again afterwards whether the work is done. A killed
    process holds nothing. Raises StorageError naming the directory when it cannot be made.
    """
    directory = cache_root().joinpath("work", *names)
    lock_path = directory.with_name(f"{directory.name}.lock")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_path.open("a")
    except OSError as error:
        raise disk_error(error, f"use the scratch space {cache_root()} ({CACHE_VARIABLE})") from None
    with lock:
        _wait_for(lock, "/".join(names))
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        shutil.rmtree(directory, ignore_errors=True)  # the lock file stays: others may be waiting on it


def _wait_for(lock: IO[str], what: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _LOGGER.warning("Another process on this machine is at work on %s; waiting for it.", what)
        fcntl.flock(lock, fcntl.LOCK_EX)


def short_digest(text: str) -> str:
    """Eight hex digits that stand for a store's URI in a directory name."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextmanager
def trainer_lock(path: Path | None) -> Iterator[None]:
    """Hold a file as long as a trainer works in the directory around it; a killed one holds nothing. None: no file."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        _take(lock.fileno(), path, seconds=_ORPHAN_SECONDS)
        yield


def wait_for_orphan(path: Path) -> None:
    """Return when no trainer holds the file: one whose parent was killed first saves its state.

    Raises TrainerCrashedError, which is retried, when that takes more than half a minute.
    """
    if path.exists():
        with path.open("a") as lock:
            _take(lock.fileno(), path, seconds=_ORPHAN_SECONDS)


def _take(descriptor: int, path: Path, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TrainerCrashedError(
                    f"The trainer process of an earlier attempt is still at work after {seconds:.0f} s (it holds "
                    f"{path}). Wait for it or end it, then run the same command again."
                ) from None
            time.sleep(0.1)
