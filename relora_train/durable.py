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
    _sync(part)
    part.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
