"""Scratch space on this machine. Nothing in it is needed to resume: a store holds all that counts. Light."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relora_train.errors import ConfigError

CACHE_VARIABLE = "RELORA_CACHE"


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

    Raises ConfigError while another live process of this machine holds it. A killed process holds nothing.
    """
    directory = cache_root().joinpath("work", *names)
    directory.mkdir(parents=True, exist_ok=True)
    lock_path = directory.with_name(f"{directory.name}.lock")
    with lock_path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another process on this machine is at work on {'/'.join(names)} ({directory}). "
                "Wait for it or stop it, or use another run id."
            ) from None
        yield directory
        shutil.rmtree(directory, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
