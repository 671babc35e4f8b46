"""A run's head: `refs/head.json` names the checkpoint that the run's line ends in."""

from __future__ import annotations

import secrets
from typing import NamedTuple

from relora_train.checkpoints.layout import head_key, parse_checkpoint_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.errors import CheckpointCorruptError
from relora_train.storage.base import ObjectStore, find_bytes, parse_json, put_json


class Head(NamedTuple):
    """The content of refs/head.json."""

    prefix: str
    """The checkpoint's."""
    etag: str
    """The record's own."""


def read_head(store: ObjectStore, run_id: str) -> Head | None:
    """Return a run's head, or None if the run has none."""
    key = head_key(run_id)
    found = find_bytes(store, key)
    if found is None:
        return None
    data, etag = found
    try:
        place = parse_checkpoint_prefix(parse_json(data)["checkpoint"])
    except (ValueError, KeyError, TypeError):
        place = None
    if place is None or place.run_id != run_id:
        raise CheckpointCorruptError(
            f"{store.uri}/{key} is damaged: it names no checkpoint of run {run_id!r}. "
            "Delete it and name the checkpoint to go on from."
        )
    return Head(place.prefix, etag)


def write_head(store: ObjectStore, run_id: str, ref: CheckpointRef, etag: str | None) -> Head:
    """Make a checkpoint the head if the record still has this etag; None: if there is no record."""
    # The nonce tells our own write from a rival's after a lost answer.
    record = {"checkpoint": ref.prefix, "step": ref.step, "fingerprint": ref.fingerprint, "nonce": secrets.token_hex(8)}
    return Head(ref.prefix, put_json(store, head_key(run_id), record, if_absent=etag is None, if_match=etag))
