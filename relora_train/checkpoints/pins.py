"""Marks that keep a checkpoint from being pruned: `runs/<run_id>/refs/<name>.json`."""

import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from relora_train.checkpoints.layout import EXPORT_NAME, HEAD_NAME, parse_checkpoint_prefix
from relora_train.checkpoints.lineage import CheckpointRef, read_checkpoint, removal_at
from relora_train.errors import CheckpointNotFoundError, ConfigError, PreconditionFailedError
from relora_train.storage.base import ObjectStore, find_json, put_json

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


def pin(store: ObjectStore, ref: CheckpointRef, name: str | None = None, *, note: str = "") -> str:
    """Keep a checkpoint from every prune until `unpin`; returns the pin's name. Safe to repeat.

    A name that pins another checkpoint is refused, and so is a checkpoint whose removal has begun.
    """
    name = name or f"pin-{_place(ref)}"
    if not _NAME.fullmatch(name) or f"{name}.json" == HEAD_NAME:
        raise ConfigError(
            f"{name!r} cannot be the name of a pin: use 1 to 80 of a-z, 0-9, '.', '_' and '-', and not 'head'."
        )
    key = f"runs/{_run_of(ref)}/refs/{name}.json"
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
                f"The pin {name!r} already holds {store.uri}/{held}. Remove that pin first, with --remove, or choose "
                "another --name."
            ) from None
    if removal := removal_at(store, ref.prefix):  # after the pin is written: a prune looks for it after the tombstone
        store.delete(key)
        raise CheckpointNotFoundError(removal)
    return name


def record_export(store: ObjectStore, ref: CheckpointRef, place: str) -> str:
    """Pin a checkpoint whose model was exported, so that the copy's origin stays."""
    return pin(store, ref, EXPORT_NAME + _place(ref), note=f"exported to {place} on {socket.gethostname()}")


def unpin(store: ObjectStore, ref: CheckpointRef, name: str | None = None) -> Sequence[str]:
    """Remove the pin of this name, or every pin and export mark of a checkpoint; returns the names removed."""
    of_run = pins_in(store, _run_of(ref))
    its_own = [known for known, prefix in of_run.items() if prefix == ref.prefix]
    found = [known for known in its_own if name in (None, known)]
    if not found:
        what = "no pin" if name is None else f"no pin {name!r}"
        other = of_run.get(name or "")
        elsewhere = f" {store.uri}/{other} is pinned as {name!r}: name that one." if other else ""
        raise ConfigError(f"{ref.uri} has {what}. It has: {', '.join(its_own) or 'none'}.{elsewhere}")
    for known in found:
        store.delete(f"runs/{_run_of(ref)}/refs/{known}.json")
    return found


def find_pinned(store: ObjectStore, run_id: str, name: str) -> CheckpointRef | None:
    """Return the checkpoint of a run that is pinned by this name, or None."""
    place = parse_checkpoint_prefix(str(pins_in(store, run_id).get(name)))
    return read_checkpoint(store, place.prefix) if place else None


def pins_in(store: ObjectStore, run_id: str) -> Mapping[str, object]:
    """Return the names of a run's pins and export marks, with the prefix of the checkpoint that each keeps."""
    refs = f"runs/{run_id}/refs/"
    keys = [info.key for info in store.list(refs) if info.key != refs + HEAD_NAME]
    return {key[len(refs) : -len(".json")]: (find_json(store, key) or {}).get("checkpoint") for key in keys}


def _run_of(ref: CheckpointRef) -> str:
    place = parse_checkpoint_prefix(ref.prefix)
    if place is None:
        raise ConfigError(f"{ref.uri} lies outside a run, where nothing is pruned: there is no need to pin it.")
    return place.run_id


def _place(ref: CheckpointRef) -> str:
    return ref.prefix.rpartition("/")[2]
