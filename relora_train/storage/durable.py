"""Files that are there completely or not at all, also after a kill or a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file so that readers see all of it or what was there before."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    replace_durably(part, path)


def replace_durably(part: Path, target: Path) -> None:
    """Give a finished temporary file, in the same directory, its name."""
    sync(part)
    part.replace(target)
    sync(target.parent)


def sync_all(directory: Path) -> None:
    """Have a directory on the disk with all that is below it."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
    sync(directory.parent)


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
