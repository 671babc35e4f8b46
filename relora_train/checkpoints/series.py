"""Promote a checkpoint in a series, roll back, look: by conditional writes.

`series:NAME` names the champion wherever a checkpoint is named, `series:NAME@3` the one that change 3 made champion.
Guarantees: pointer and history move together or not at all; nothing is ever taken out of the history; of two writers
none is lost; a checkpoint whose removal has begun is never promoted, and one that is promoted is never pruned.
"""

from __future__ import annotations

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
    promotion_behind,
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
    change = record.latest if number is None else record.numbered(number)
    if change is None:
        raise CheckpointNotFoundError(
            f"Series {name!r} has changes 1 to {len(record.changes)}, and none numbered {number}. "
            f"`relora series {name}` lists them."
        )
    return _checkpoint_of(store, name, change)


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

    def change(record: SeriesRecord | None) -> Change:
        current = record.latest.checkpoint if record else None
        if record and current == ref.prefix:
            return record.latest
        if expected != ANYTHING and current != expected:
            raise PreconditionFailedError(
                f"Series {name!r} was moved to {current} meanwhile, and {ref.uri} was not compared with that. "
                f"Nothing was changed; promote it by hand if it is wanted: relora promote {name} {ref.uri}."
            )
        return _change(record, ref, kind="promote", reason=reason, run_id=run_id, scores=scores)

    return _append(store, name, ref, change)


def roll_back(store: ObjectStore, name: str, to: int | None = None, *, reason: str) -> Change:
    """Make an earlier champion the champion again and return the change: that of number `to`, else the one before.

    Repeated without `to` it goes back further each time. Raises CheckpointNotFoundError where there is none, or where
    it was pruned.
    """
    record = read_series(store, name)
    target = _rollback_target(record, to)
    ref = _checkpoint_of(store, name, target)
    seen = record.latest.number

    def change(record: SeriesRecord | None) -> Change:
        if record is None or record.latest.number != seen:
            raise PreconditionFailedError(
                f"Another writer changed series {name!r} at the same moment. Nothing was rolled back: look at "
                f"`relora series {name}`, then roll back again."
            )
        return _change(record, ref, kind="rollback", reason=reason, back_to=target.number)

    return _append(store, name, ref, change)


def who() -> str:
    """Return 'user@host', for the history."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user id needs no name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _append(
    store: ObjectStore, name: str, ref: CheckpointRef, change: Callable[[SeriesRecord | None], Change]
) -> Change:
    """Add the change that `change` makes of the present record, again if another writer was faster. See its caller."""
    key = series_key(name, PROMOTED_NAME)
    mark = pin(store, ref, f"promoting-{secrets.token_hex(6)}", note=f"while series {name} is changed")
    try:
        for _ in range(_ATTEMPTS):
            found = find_series(store, name)
            record, etag = found or (None, None)
            made = change(record)
            if record is not None and made is record.latest:
                return made
            changed = SeriesRecord(series=name, changes=(*(record.changes if record else ()), made))
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


def _change(record: SeriesRecord | None, ref: CheckpointRef, **fields: object) -> Change:
    return Change.model_validate(
        {
            "number": len(record.changes) + 1 if record else 1,
            "checkpoint": ref.prefix,
            "fingerprint": ref.fingerprint,
            "stage": ref.manifest.stage,
            "step": ref.step,
            "replaced": record.latest.checkpoint if record else None,
            "by": who(),
            "nonce": secrets.token_hex(8),
            **fields,
        }
    )


def _rollback_target(record: SeriesRecord, to: int | None) -> Change:
    line = champions_in_order(record.changes)
    if to is None:
        if len(line) < 2:
            raise CheckpointNotFoundError(
                f"Series {record.series!r} has no champion before the present one to go back to. "
                f"`relora series {record.series}` shows its history."
            )
        return line[-2]
    if record.numbered(to) is None:
        raise CheckpointNotFoundError(
            f"Series {record.series!r} has changes 1 to {len(record.changes)}, and none numbered {to}. "
            f"`relora series {record.series}` lists them."
        )
    target = promotion_behind(record.changes, to)
    if target.checkpoint == record.latest.checkpoint:
        raise ConfigError(f"{target.checkpoint} (change {to}) is the champion of series {record.series!r} already.")
    return target


def _checkpoint_of(store: ObjectStore, name: str, change: Change) -> CheckpointRef:
    ref = read_checkpoint(store, change.checkpoint)
    if ref is not None and ref.fingerprint == change.fingerprint:
        return ref
    uri = f"{store.uri}/{change.checkpoint}"
    why = removal_at(store, change.checkpoint) or f"{uri} is not there: it was deleted, or never copied here."
    raise CheckpointNotFoundError(
        f"Change {change.number} of series {name!r} names a checkpoint that cannot be had. {why} Bring it back, or "
        f"name another champion: relora rollback {name} --to N, or relora promote {name} CHECKPOINT."
    )
