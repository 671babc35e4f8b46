"""Tombstones: `<prefix>/deleted.json`, which retention writes before it deletes anything of a checkpoint.

A tombstone holds the manifest. The lineage stays known, and a stage whose checkpoint was pruned is not trained again.
While the tombstone exists, nothing can be committed under its prefix, so a delayed delete cannot remove new files. To
train such a stage again, use another run id, or delete the tombstone by hand.
"""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import Field

from relora_train.checkpoints.layout import join_key
from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.checkpoints.record import StoredRecord
from relora_train.storage.base import ObjectStore

TOMBSTONE_NAME = "deleted.json"


class Tombstone(StoredRecord):
    """Which checkpoint was here, when it was removed and why."""

    removed_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    """By the clock of the machine that removed it, for people."""
    reason: str
    manifest: CheckpointManifest


def read_tombstone(store: ObjectStore, prefix: str) -> Tombstone | None:
    """Return the tombstone at a prefix, or None."""
    advice = "It does not say which checkpoint was removed here. Delete it; the stage is then trained again on demand."
    found = Tombstone.find(store, join_key(prefix, TOMBSTONE_NAME), advice=advice)
    return found and found[0]


def removal_at(store: ObjectStore, prefix: str) -> str | None:
    """Return what to tell a reader of the checkpoint that was pruned at a prefix, or None if none was."""
    tombstone, uri = read_tombstone(store, prefix), join_key(store.uri, prefix)
    if tombstone is None:
        return None
    return (
        f"{uri} was removed by `relora prune` at {tombstone.removed_at.isoformat(sep=' ', timespec='seconds')} "
        f"({tombstone.reason}). Use another checkpoint of the run, train it again under another run id, or delete "
        f"{uri}/{TOMBSTONE_NAME} so that the same run id may train it again."
    )
