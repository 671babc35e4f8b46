"""The records that a series of retrained models keeps in its store.

- series/<name>/promoted.json: every promotion and rollback, oldest first; the last one names the champion
- series/<name>/data.json: the source files (or hub revision) that its models have been trained on
- series/<name>/decisions/<run_id>-<8 hex>.json: the decision about one candidate, with its scores
- series/<name>/lease.json: the retrain that is under way (lease.py)

Pointer and history are one object, changed by If-Match only and only by adding to its end. They cannot disagree,
whatever is killed, and of two writers the second adds to what the first wrote.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from relora_train.checkpoints.layout import check_name, parse_checkpoint_prefix
from relora_train.checkpoints.manifest import StoredRecord
from relora_train.errors import CheckpointCorruptError, CheckpointNotFoundError
from relora_train.storage.base import ObjectStore

SERIES_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}"
PROMOTED_NAME = "promoted.json"
ROLLBACK_TARGETS = 3
"""This many champions before the present one are kept from every prune."""


class _Record(StoredRecord):
    # A loss may be infinite, and must come back as it was.
    model_config = ConfigDict(ser_json_inf_nan="constants")


class Scores(_Record):
    """Validation losses in nats per token, on the same held-out set with the same settings."""

    candidate_loss: float
    champion_loss: float | None
    """None for the first of a series."""
    dataset_uri: str
    """Its validation split is the held-out set."""


class Change(_Record):
    """One move of a series' pointer."""

    number: int = Field(ge=1)
    kind: Literal["promote", "rollback"]
    checkpoint: str
    """Prefix in the series' own store, so that the store can move."""
    fingerprint: str
    stage: str
    step: int
    replaced: str | None
    """Prefix of the champion until then."""
    by: str
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    reason: str
    back_to: int | None = None
    """For a rollback: the number of the promotion that holds again."""
    run_id: str | None = None
    """The retrain that made the candidate; None for a change by hand."""
    scores: Scores | None = None
    nonce: str
    """Tells our own write from a rival's after a lost answer."""

    @model_validator(mode="after")
    def checkpoint_lies_in_a_run(self) -> Self:
        if parse_checkpoint_prefix(self.checkpoint) is None:
            raise ValueError(f"{self.checkpoint!r} is no checkpoint's prefix")
        return self


class SeriesRecord(_Record):
    """The content of promoted.json."""

    format_version: Literal[1] = 1
    series: str
    changes: tuple[Change, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def each_change_follows_those_before(self) -> Self:
        if [change.number for change in self.changes] != list(range(1, len(self.changes) + 1)):
            raise ValueError("the changes are not numbered 1, 2, 3, …")
        for change in self.changes:
            if (change.kind == "rollback") != (change.back_to is not None) or (change.back_to or 0) >= change.number:
                raise ValueError(f"change {change.number} does not say what it goes back to")
        return self

    @property
    def latest(self) -> Change:
        """Its checkpoint is the champion."""
        return self.changes[-1]

    def numbered(self, number: int) -> Change:
        """Return the change of this number; CheckpointNotFoundError for none."""
        if 1 <= number <= len(self.changes):
            return self.changes[number - 1]
        raise CheckpointNotFoundError(
            f"Series {self.series!r} has changes 1 to {len(self.changes)}, and none numbered {number}. "
            f"`relora series {self.series}` lists them."
        )


def check_series(name: str) -> str:
    """Return the name of a series, or refuse one that could not be a folder and the beginning of a run id."""
    return check_name(name, "name of a series", longest=80)


def series_key(name: str, what: str) -> str:
    return f"series/{check_series(name)}/{what}"


def is_pointer(key: str) -> bool:
    """Return True for the key of a series' promoted.json."""
    return re.fullmatch(rf"series/{SERIES_PATTERN}/{re.escape(PROMOTED_NAME)}", key) is not None


def find_series(store: ObjectStore, name: str) -> tuple[SeriesRecord, str] | None:
    """Return what promoted.json holds, and its etag, or None before the first promotion."""
    key = series_key(name, PROMOTED_NAME)
    advice = (
        f"Nobody can say which checkpoint series {name!r} has promoted. Restore an older version of it, or delete it "
        f"and name the champion: relora promote {name} CHECKPOINT."
    )
    found = SeriesRecord.find(store, key, advice=advice)
    if found is not None and found[0].series != name:
        why = f"it belongs to series {found[0].series!r}: it was copied or renamed"
        raise CheckpointCorruptError(f"{store.uri}/{key} is damaged ({why}). {advice}")
    return found


def champions_in_order(changes: Sequence[Change]) -> Sequence[Change]:
    """Return the promotions that led to the present champion, itself last, without those taken back. Pure."""
    line: list[Change] = []
    for change in changes:
        if change.back_to is None:
            line.append(change)
            continue
        target = changes[change.back_to - 1]
        kept = [index for index, one in enumerate(line) if one.number == target.number]
        # A promotion that was taken back, and is wanted again after all, goes on top like a new one.
        line = line[: kept[0] + 1] if kept else [*line, target]
    return line


def protected_by(record: SeriesRecord) -> Mapping[str, str]:
    """Return prefix -> reason to stay: the champion, those before it, and what the last change took away. Pure."""
    line = champions_in_order(record.changes)
    found = {change.checkpoint: f"series {record.series} can go back to it" for change in line[-1 - ROLLBACK_TARGETS :]}
    if record.latest.replaced is not None:
        found.setdefault(record.latest.replaced, f"series {record.series} has just left it")
    found[record.latest.checkpoint] = f"promoted in series {record.series}"
    return found
