"""Local scratch space. You can delete it at any time; everything needed to resume is in the store."""

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from relora_train.errors import TrainerCrashedError
from relora_train.storage.durable import disk_error, write_durably

_LOGGER = logging.getLogger(__name__)

CACHE_VARIABLE = "RELORA_CACHE"
ORIGIN_FILE = "origin"
_ORPHAN_SECONDS = 30.0


def cache_root() -> Path:
    """Return $RELORA_CACHE, else relora-train below the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").expanduser().resolve() / "relora-train"


def checkpoint_cache(run_id: str) -> Path:
    """Return the directory to which checkpoints are downloaded from a store that is no local directory."""
    return cache_root() / "checkpoints" / run_id


def dataset_cache(dataset_id: str) -> Path:
    """Return the directory to which a dataset is downloaded."""
    return cache_root() / "datasets" / dataset_id[:16]


class WorkDirectory:
    """A directory of this name for one process at a time, from now on until it is released.

    While another live process of this machine holds it, waits (or with wait=False raises BlockingIOError): look again
    afterwards whether the work is done. A killed process holds nothing. Raises StorageError naming the directory when
    it cannot be made. A `with` block removes it at a good end, and keeps it after an error.
    """

    def __init__(self, *names: str, wait: bool = True) -> None:
        self.path = cache_root().joinpath("work", *names)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self.path.with_name(f"{self.path.name}.lock").open("a")
        except OSError as error:
            raise disk_error(error, f"use the scratch space {cache_root()} ({CACHE_VARIABLE})") from None
        self.waited = False
        """True: another process held it meanwhile, and may have done the work."""
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                what = "/".join(names)
                _LOGGER.warning("Another process on this machine is at work on %s; waiting for it.", what)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                self.waited = True
            self.path.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.release(remove=kind is None)

    @classmethod
    def left_over(cls, *names: str) -> Self | None:
        """Return the directory that another process left, if it exists and nobody holds it. Never waits."""
        try:
            return cls(*names, wait=False) if cache_root().joinpath("work", *names).is_dir() else None
        except BlockingIOError:
            return None

    def release(self, *, remove: bool) -> None:
        """Let others have it, with what is in it or without. Only the first call counts."""
        if self._lock.closed:
            return
        if remove:
            shutil.rmtree(self.path, ignore_errors=True)  # the lock file stays: others may be waiting on it
        self._lock.close()


def keep_work_from(directory: Path, origin: str) -> bool:
    """Empty a work directory unless all in it began from `origin`; note the origin and return True if it matched.

    origin: digest of the bytes from which the work begins. A directory without the note may stay as it is: it is empty,
    or of a version that began only from what a store holds. Call it while nobody works in the directory.
    """
    note = directory / ORIGIN_FILE
    known = note.read_text().strip() if note.is_file() else None
    if known == origin:
        return True
    if known is not None:
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != note:  # last: a kill on the way must not make the rest look like work without a memory
                path.unlink()
    write_durably(note, f"{origin}\n".encode())
    return known is None


def short_digest(text: str) -> str:
    """Return eight hex digits that stand for a store's URI in a directory name."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextmanager
def trainer_lock(path: Path | None) -> Iterator[None]:
    """Hold a file as long as a trainer works in the directory around it; a killed one holds nothing. None: no file.

    A trainer whose parent was killed first saves its state. TrainerCrashedError, which is retried, comes when that
    takes more than half a minute.
    """
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TrainerCrashedError(
                        f"The trainer process of an earlier attempt is still at work after {_ORPHAN_SECONDS:.0f} s (it "
                        f"holds {path}). Wait for it or end it, then run the same command again."
                    ) from None
                time.sleep(0.1)
        yield


def wait_for_orphan(path: Path) -> None:
    """Return when no trainer holds the file, or raise as `trainer_lock` does."""
    with trainer_lock(path if path.exists() else None):
        pass
