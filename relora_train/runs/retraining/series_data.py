"""The data that the models of a series have been trained on, and the decisions about them, in the series' store.

A source file counts as seen once its candidate is decided, never before: a killed retrain leaves it new. `pending`
holds the data of a retrain that has begun. Its rerun takes the same, though more has come since, and finds its stages
and snapshots again. Only the holder of the series' lease writes.
"""

import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from relora_train.checkpoints.manifest import StoredRecord
from relora_train.checkpoints.series_record import Scores, find_series, series_key
from relora_train.errors import CheckpointCorruptError, PreconditionFailedError
from relora_train.settings.base import FrozenConfig
from relora_train.settings.keys import settings_digest
from relora_train.storage.base import ObjectStore

_log = logging.getLogger("relora_train.runs.retraining.series_data")

Outcome = Literal["promoted", "refused", "overtaken"]
"""overtaken: better, but another writer moved the series meanwhile, and the candidate was not compared with that."""


class Pending(FrozenConfig):
    """A retrain that has begun and is not decided."""

    run_id: str
    new: tuple[str, ...]
    """Digests of its new files, or the hub revision."""
    champion: str | None
    """Prefix of the champion it began with."""

    @property
    def is_revision(self) -> bool:
        """A commit id is shorter than a digest."""
        return any(len(part) < 64 for part in self.new)


class SeriesData(StoredRecord):
    """The content of data.json."""

    format_version: Literal[1] = 1
    series: str
    validation_fraction: float | None = None
    """The first retrain's. With another one, documents that were held out would be trained on."""
    seen: tuple[str, ...] = ()
    """Digests of source files, sorted; for a hub dataset, the last revision."""
    pending: Pending | None = None
    nonce: str = Field(default_factory=lambda: secrets.token_hex(8))


class Decision(StoredRecord):
    """The decision about one candidate: decisions/<run_id>-<8 hex>.json."""

    series: str
    run_id: str
    outcome: Outcome
    reason: str
    candidate_uri: str
    champion_uri: str | None
    """The candidate was compared with it; None for the first of a series."""
    scores: dict[str, Any]
    """The fields of Scores; a loss that is no finite number is written as text."""
    margin: str
    """'0.01 relative'."""
    new: tuple[str, ...]
    """Digests of the files (or hub revision) that were new."""
    data_is_seen: bool
    """True: the next retrain leaves these files out."""
    by: str
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    provenance: dict[str, str] = Field(default_factory=dict)
    nonce: str = Field(default_factory=lambda: secrets.token_hex(8))


def read_data(store: ObjectStore, name: str) -> tuple[SeriesData, str | None]:
    """Return what a series has seen, and the etag to write it back with; nothing, and None, for a new one."""
    key = series_key(name, "data.json")
    advice = (
        f"Nobody can say which data series {name!r} has been trained on. Restore an older version of it, or delete it: "
        "the next retrain then takes all data as new."
    )
    data, etag = SeriesData.find(store, key, advice=advice) or (SeriesData(series=name), None)
    if data.series != name:
        raise CheckpointCorruptError(f"{store.uri}/{key} is damaged (it belongs to series {data.series!r}). {advice}")
    return data, etag


def _change(store: ObjectStore, name: str, fields: Callable[[SeriesData], dict[str, Any]]) -> None:
    """Replace fields of what the series has seen. Raise PreconditionFailedError if another process wrote meanwhile."""
    data, etag = read_data(store, name)
    changed = data.model_copy(update=fields(data))
    if changed == data:
        return
    key = series_key(name, "data.json")
    fresh = changed.model_copy(update={"nonce": secrets.token_hex(8)})
    try:
        store.put_bytes(key, fresh.to_bytes(), if_absent=etag is None, if_match=etag)
    except PreconditionFailedError as error:
        raise PreconditionFailedError(
            f"Another process wrote {store.uri}/{key} at the same moment, which only one retrain at a time may. Look "
            "for a second one, then run again."
        ) from error


def begin(store: ObjectStore, name: str, pending: Pending, validation_fraction: float) -> None:
    """Write down what a retrain has begun with. Safe to repeat."""
    _change(store, name, lambda data: {"pending": pending, "validation_fraction": validation_fraction})


def end(store: ObjectStore, name: str, new: Collection[str], *, replaces: bool) -> None:
    """Count data as seen and the pending retrain as decided. Safe to repeat. replaces: a hub revision."""

    def seen(data: SeriesData) -> set[str]:
        return set(new) if replaces and new else {*data.seen, *new}

    _change(store, name, lambda data: {"pending": None, "seen": tuple(sorted(seen(data)))})


def forget(store: ObjectStore, name: str, run_ids: Collection[str]) -> int:
    """Make the data new again that the candidates of these runs were promoted with, and return how many parts.

    For a hub dataset the whole revision is then new.
    """
    taken: set[str] = set()
    for decision in read_decisions(store, name):
        if decision.outcome == "promoted" and decision.run_id in run_ids:
            taken |= {*decision.new}
    again = taken & {*read_data(store, name)[0].seen}
    _change(store, name, lambda data: {"seen": tuple(part for part in data.seen if part not in taken)})
    return len(again)


def record_decision(store: ObjectStore, decision: Decision) -> None:
    """Keep a decision, unless there is one about the same candidate, champion and margin."""
    judged = {"candidate": decision.candidate_uri, "champion": decision.champion_uri, "margin": decision.margin}
    key = series_key(decision.series, f"decisions/{decision.run_id}-{settings_digest(judged)[:8]}.json")
    with suppress(PreconditionFailedError):
        store.put_bytes(key, decision.to_bytes(), if_absent=True)


def read_decisions(store: ObjectStore, name: str) -> Sequence[Decision]:
    """Return every decision of a series, oldest first."""
    advice = "Nothing but this record depends on it: delete it and run again."
    found = [Decision.find(store, info.key, advice=advice) for info in store.list(series_key(name, "decisions/"))]
    return sorted((one[0] for one in found if one), key=lambda decision: decision.at)


def scores_record(scores: Scores) -> dict[str, Any]:
    """Return scores for JSON: a loss that is no finite number becomes text, which every reader understands."""
    values = scores.model_dump()
    numbers = {key: value for key, value in values.items() if isinstance(value, float)}
    return {**values, **{key: str(value) for key, value in numbers.items() if value - value != 0}}


def finish_promoted(store: ObjectStore, series: str) -> None:
    """Count the data of a retrain as seen that was killed between its promotion and its end."""
    data, _ = read_data(store, series)
    found, pending = find_series(store, series), data.pending
    if pending is None or found is None:
        return
    made = [change for change in found[0].changes if change.run_id == pending.run_id]
    if not any(change.replaced == pending.champion for change in made):
        return
    _log.warning("A retrain of series %r was killed after its promotion; its data counts as seen now.", series)
    if not any(one.run_id == pending.run_id and one.outcome == "promoted" for one in read_decisions(store, series)):
        change = made[-1]
        decision = Decision(
            series=series,
            run_id=pending.run_id,
            outcome="promoted",
            reason=change.reason,
            candidate_uri=f"{store.uri}/{change.checkpoint}",
            champion_uri=f"{store.uri}/{change.replaced}" if change.replaced else None,
            scores=scores_record(change.scores) if change.scores else {},
            margin="",
            new=pending.new,
            data_is_seen=True,
            by=change.by,
            at=change.at,
        )
        record_decision(store, decision)
    end(store, series, pending.new, replaces=pending.is_revision)
