"""Promote a checkpoint in a series, roll back, look: by conditional writes.

`series:NAME` names the champion wherever a checkpoint is named, `series:NAME@3` the one that change 3 made champion.
Guarantees: pointer and history move together or not at all; nothing is ever taken out of the history; of two writers
none is lost; a checkpoint whose removal has begun is never promoted, and one that is promoted is never pruned.
"""

import getpass
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Final

from relora_train.checkpoints.layout import parse_checkpoint_prefix
from relora_train.checkpoints.lineage import CheckpointRef, read_checkpoint, removal_at
from relora_train.checkpoints.pins import pin, unpin
from relora_train.checkpoints.series_record import (
    PROMOTED_NAME,
    Change,
    Scores,
    SeriesRecord,
    champions_in_order,
    check_series,
    find_series,
    is_pointer,
    series_key,
)
from relora_train.errors import CheckpointNotFoundError, ConfigError, PreconditionFailedError
from relora_train.storage.base import ObjectStore

_ATTEMPTS = 20
ANYTHING: Final = "anything"
"""Stands for any expected champion."""


def list_series(store: ObjectStore) -> Sequence[str]:
    """Return the names of all series that have promoted something."""
    return [key.split("/")[1] for key in (info.key for info in store.list("series/")) if is_pointer(key)]


def read_series(store: ObjectStore, name: str) -> SeriesRecord:
    """Return a series' history. Raise CheckpointNotFoundError, which names those there are, if it has none."""
    found = find_series(store, name)
    if found is None:
        known = ", ".join(list_series(store)) or "none"
        raise CheckpointNotFoundError(
            f"{store.uri} has no series {name!r} with a promoted checkpoint. Series there: {known}. "
            f"Start one with `relora retrain {name} PROFILE` or `relora promote {name} CHECKPOINT`."
        )
    return found[0]


def find_champion(store: ObjectStore, name: str) -> CheckpointRef | None:
    """Return the champion, or None before the first promotion. Raise CheckpointNotFoundError if it is gone."""
    found = find_series(store, name)
    return None if found is None else _checkpoint_of(store, name, found[0].latest)


def resolve_series(store: ObjectStore, name: str, number: int | None = None) -> CheckpointRef:
    """Return the champion, or the checkpoint that the change of this number promoted or went back to."""
    record = read_series(store, name)
    return _checkpoint_of(store, name, record.latest if number is None else record.numbered(number))


def promote(
    store: ObjectStore,
    name: str,
    ref: CheckpointRef,
    *,
    reason: str,
    expected: str | None = ANYTHING,
    run_id: str | None = None,
    scores: Scores | None = None,
) -> Change:
    """Make a checkpoint of this store the champion and return the change in the history. Safe to repeat.

    expected: prefix of the champion that it was compared with, None for no champion yet; another one there by now is a
    PreconditionFailedError. A checkpoint that is the champion already changes nothing.
    Raises CheckpointNotFoundError for a checkpoint that is being pruned, ConfigError for one of another store.
    """
    check_series(name)
    if ref.store_uri != store.uri or parse_checkpoint_prefix(ref.prefix) is None:
        raise ConfigError(
            f"{ref.uri} does not lie in a run of {store.uri}, where series {name!r} is kept: only there is it safe "
            "from pruning. Train or copy the run there, or keep the series in that store."
        )

    def check(record: SeriesRecord | None) -> None:
        current = record.latest.checkpoint if record else None
        if expected != ANYTHING and current != expected:
            raise PreconditionFailedError(
                f"Series {name!r} was moved to {current} meanwhile, and {ref.uri} was not compared with that. "
                f"Nothing was changed; promote it by hand if it is wanted: relora promote {name} {ref.uri}."
            )

    return _append(store, name, ref, check, kind="promote", reason=reason, run_id=run_id, scores=scores)


def roll_back(store: ObjectStore, name: str, to: int | None = None, *, reason: str) -> Change:
    """Make an earlier champion the champion again and return the change: that of number `to`, else the one before.

    Repeated without `to` it goes back further each time. Raises CheckpointNotFoundError where there is none, or where
    it was pruned.
    """
    seen = read_series(store, name)
    if to is None:
        line = champions_in_order(seen.changes)
        if len(line) < 2:
            raise CheckpointNotFoundError(
                f"Series {name!r} has no champion before the present one to go back to. "
                f"`relora series {name}` shows its history."
            )
        target = line[-2]
    else:
        target = seen.numbered(to)
        while target.back_to is not None:
            target = seen.numbered(target.back_to)
        if target.checkpoint == seen.latest.checkpoint:
            raise ConfigError(f"{target.checkpoint} (change {to}) is the champion of series {name!r} already.")
    ref = _checkpoint_of(store, name, target)

    def check(record: SeriesRecord | None) -> None:
        if record is None or record.latest.number != seen.latest.number:
            raise PreconditionFailedError(
                f"Another writer changed series {name!r} at the same moment. Nothing was rolled back: look at "
                f"`relora series {name}`, then roll back again."
            )

    return _append(store, name, ref, check, kind="rollback", reason=reason, back_to=target.number)


def who() -> str:
    """Return 'user@host', for the history."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user id needs no name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _append(
    store: ObjectStore, name: str, ref: CheckpointRef, check: Callable[[SeriesRecord | None], None], **fields: object
) -> Change:
    """Add a change to `ref` if `check` allows it on the present record; check anew if another writer was faster.

    A promotion of the present champion changes nothing.
    """
    key = series_key(name, PROMOTED_NAME)
    mark = pin(store, ref, f"promoting-{secrets.token_hex(6)}", note=f"while series {name} is changed")
    try:
        for _ in range(_ATTEMPTS):
            record, etag = find_series(store, name) or (None, None)
            if record and fields["kind"] == "promote" and record.latest.checkpoint == ref.prefix:
                return record.latest
            check(record)
            before = record.changes if record else ()
            made = Change.model_validate(
                {
                    "number": len(before) + 1,
                    "checkpoint": ref.prefix,
                    "fingerprint": ref.fingerprint,
                    "stage": ref.manifest.stage,
                    "step": ref.step,
                    "replaced": before[-1].checkpoint if before else None,
                    "by": who(),
                    "nonce": secrets.token_hex(8),
                    **fields,
                }
            )
            changed = SeriesRecord(series=name, changes=(*before, made))
            try:
                store.put_bytes(key, changed.to_bytes(), if_absent=etag is None, if_match=etag)
                return made
            except PreconditionFailedError:
                continue  # another writer was first: judge anew
        raise PreconditionFailedError(
            f"{store.uri}/{key} changed {_ATTEMPTS} times while {ref.uri} was to be added. Run again when the others "
            "are done."
        )
    finally:
        unpin(store, ref, mark)  # from here on the record itself protects the checkpoint


def _checkpoint_of(store: ObjectStore, name: str, change: Change) -> CheckpointRef:
    ref = read_checkpoint(store, change.checkpoint)
    if ref is not None and ref.fingerprint == change.fingerprint:
        return ref
    uri = f"{store.uri}/{change.checkpoint}"
    why = removal_at(store, change.checkpoint) or f"{uri} is not there: it was deleted, or never copied here."
    raise CheckpointNotFoundError(
        f"Change {change.number} of series {name!r} names a checkpoint that cannot be had. {why} Bring it back, or "
        f"name another champion: relora promote {name} --rollback --to N, or relora promote {name} CHECKPOINT."
    )
