"""What is left of a checkpoint that retention removed: `<prefix>/deleted.json`, written before any delete. Light.

It holds the manifest, so that the lineage stays known and a stage whose checkpoint was removed is not trained again.
While it lies there nothing can be committed to the prefix: a late delete of whoever removed the old files can
therefore never hit a new one. To train such a stage again: another run id, or delete the tombstone by hand.
"""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.errors import CheckpointCorruptError
from relora_train.storage.base import ObjectStore, find_bytes

TOMBSTONE_NAME = "deleted.json"


class Tombstone(BaseModel):
    """Which checkpoint was here, when it was removed and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    removed_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    """By the clock of the machine that removed it, for people."""
    reason: str
    manifest: CheckpointManifest

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


def read_tombstone(store: ObjectStore, prefix: str) -> Tombstone | None:
    """The tombstone at a prefix, or None."""
    key = f"{prefix}/{TOMBSTONE_NAME}" if prefix else TOMBSTONE_NAME
    found = find_bytes(store, key)
    if found is None:
        return None
    data, _ = found
    try:
        return Tombstone.model_validate_json(data)
    except ValidationError:
        raise CheckpointCorruptError(
            f"{store.uri}/{key} is damaged: it does not say which checkpoint was removed here. Delete it; the stage "
            "is then trained again if it is asked for."
        ) from None


def removed_message(uri: str, tombstone: Tombstone) -> str:
    """What to say to who wants a removed checkpoint."""
    return (
        f"{uri} was removed by `relora prune` at {tombstone.removed_at.isoformat(sep=' ', timespec='seconds')} "
        f"({tombstone.reason}). Use another checkpoint of the run, train it again under another run id, or delete "
        f"{uri}/{TOMBSTONE_NAME} so that the same run id may train it again."
    )
