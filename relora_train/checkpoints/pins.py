"""Marks that keep a checkpoint from being pruned: `runs/<run_id>/refs/<name>.json`."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from relora_train.checkpoints.layout import EXPORT_NAME, HEAD_NAME, parse_checkpoint_prefix
from relora_train.checkpoints.lineage import CheckpointRef, removal_at
from relora_train.errors import CheckpointNotFoundError, ConfigError, PreconditionFailedError
from relora_train.storage.base import ObjectStore, find_json, put_json

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


def pin(store: ObjectStore, ref: CheckpointRef, name: str | None = None, *, note: str = "") -> str:
    """Keep a checkpoint from every prune until it is unpinned; returns the pin's name. Safe to repeat.

    A name that pins another checkpoint is refused, and so is a checkpoint whose removal has begun.
    """
    name = name or f"pin-{_place(ref)}"
    if not _NAME.fullmatch(name) or f"{name}.json" == HEAD_NAME:
        raise ConfigError(
            f"{name!r} cannot be the name of a pin: use 1 to 80 of a-z, 0-9, '.', '_' and '-', and not 'head'."
        )
    key = _key(ref, name)
    record = {
        "checkpoint": ref.prefix, "step": ref.step, "fingerprint": ref.fingerprint, "note": note,
        "pinned_at": datetime.now(UTC).isoformat(timespec="seconds"), "nonce": secrets.token_hex(8),
    }  # fmt: skip
    try:
        put_json(store, key, record, if_absent=True)
    except PreconditionFailedError:
        held = (find_json(store, key) or {}).get("checkpoint", f"something that cannot be read ({key})")
        if held != ref.prefix:
            raise ConfigError(
                f"The pin {name!r} already holds {store.uri}/{held}. Unpin that first, or choose another --name."
            ) from None
    if removal := removal_at(store, ref.prefix):  # after the pin is written: a prune looks for it after the tombstone
        store.delete(key)
        raise CheckpointNotFoundError(removal)
    return name


def record_export(store: ObjectStore, ref: CheckpointRef, directory: Path) -> str:
    """Pin a checkpoint whose model was exported, so that the copy's origin stays."""
    return pin(store, ref, EXPORT_NAME + _place(ref), note=f"exported to {directory} on {socket.gethostname()}")


def unpin(store: ObjectStore, ref: CheckpointRef, name: str | None = None) -> Sequence[str]:
    """Remove the pin of this name, or every pin and export mark of a checkpoint; returns the names removed."""
    found = [known for known in pins_of(store, ref) if name in (None, known)]
    if not found:
        what = "no pin" if name is None else f"no pin {name!r}"
        raise ConfigError(f"{ref.uri} has {what}. It has: {', '.join(pins_of(store, ref)) or 'none'}.")
    for known in found:
        store.delete(_key(ref, known))
    return found


def pins_of(store: ObjectStore, ref: CheckpointRef) -> Sequence[str]:
    """Return the names of a checkpoint's pins and export marks."""
    found = []
    for info in store.list(_key(ref, "")[: -len(".json")]):
        name = info.key.rpartition("/")[2]
        if name == HEAD_NAME:
            continue
        if (find_json(store, info.key) or {}).get("checkpoint") == ref.prefix:
            found.append(name.removesuffix(".json"))
    return found


def _key(ref: CheckpointRef, name: str) -> str:
    place = parse_checkpoint_prefix(ref.prefix)
    if place is None:
        raise ConfigError(f"{ref.uri} lies outside a run, where nothing is pruned: there is no need to pin it.")
    return f"runs/{place.run_id}/refs/{name}.json"


def _place(ref: CheckpointRef) -> str:
    return ref.prefix.rpartition("/")[2]
