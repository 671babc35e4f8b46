"""Some files of a checkpoint, fetched by name and verified. Light."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from relora_train.checkpoints.bundle import fetch_bundle
from relora_train.checkpoints.store import CheckpointRef
from relora_train.errors import CheckpointIncompleteError
from relora_train.storage.opening import open_store

FetchFiles = Callable[[CheckpointRef, Sequence[str]], Path]
"""Gives a local directory in which the named files of a checkpoint lie, and maybe others."""


def files_in_stores(cache_dir: Path) -> FetchFiles:
    """Files of checkpoints in the stores they were found in, verified by size and SHA-256 as by `fetch_checkpoint`.

    In place for a store on this machine's disk; else downloaded below `cache_dir`, only the files asked for, once.
    """

    def fetch(ref: CheckpointRef, names: Sequence[str]) -> Path:
        entries = tuple(entry for entry in ref.manifest.files if entry.path in names)
        if missing := sorted(set(names) - {entry.path for entry in entries}):
            raise CheckpointIncompleteError(
                f"{ref.uri} holds no {' and no '.join(missing)}: its manifest names none. Use another checkpoint."
            )
        part = ref.manifest.model_copy(update={"files": entries})
        directory = cache_dir / f"report-{ref.fingerprint[:12]}-{ref.manifest.attempt}"
        return fetch_bundle(open_store(ref.store_uri), ref.prefix, part, directory)

    return fetch
