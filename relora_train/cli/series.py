"""`relora series`, `promote` and `rollback`: the champions of retrained models."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train.checkpoints.lease import hold_series
from relora_train.checkpoints.series import list_series, read_series, roll_back
from relora_train.checkpoints.series import promote as promote_checkpoint
from relora_train.checkpoints.series_record import Change, SeriesRecord, champions_in_order
from relora_train.cli.options import AsJson, CheckpointName, SeriesName, Store, answer, open_named, resolve
from relora_train.cli.output import say
from relora_train.cli.tables import BLANK, View, add_row, facts, table
from relora_train.runs.retraining.series_data import forget, read_data, read_decisions
from relora_train.storage.base import ObjectStore
from relora_train.text import decimal, moment


def series(
    name: Annotated[str | None, typer.Argument(metavar="SERIES", help="Its history; all series when absent.")] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the series of a store with what they have promoted, or show the history of one."""
    opened = open_named(store)
    answer(
        as_json,
        record=lambda: series_record(opened, name) if name else all_series_record(opened),
        view=lambda: series_view(opened, name) if name else all_series_view(opened),
    )


def promote(
    series: SeriesName,
    checkpoint: CheckpointName,
    reason: Annotated[str, typer.Option(help="For the history.")] = "promoted by hand",
    store: Store = None,
) -> None:
    """Make a checkpoint the champion of a series; the next retrain goes on from it."""
    opened = open_named(store)
    made = promote_checkpoint(opened, series, resolve(checkpoint, opened.uri), reason=reason)
    say(change_line(opened, series, made))


def rollback(
    series: SeriesName,
    to: Annotated[
        int | None, typer.Option(min=1, help="Number of the change to go back to; the champion before when absent.")
    ] = None,
    data_again: Annotated[
        bool, typer.Option("--data-again", help="What the promotions taken back were trained on is new data again.")
    ] = False,
    reason: Annotated[str, typer.Option(help="For the history.")] = "rolled back by hand",
    store: Store = None,
) -> None:
    """Make an earlier champion of a series the champion again."""
    opened = open_named(store)
    with hold_series(opened, series) if data_again else nullcontext():  # refuses while a retrain is under way
        before = champions_in_order(read_series(opened, series).changes)
        say(change_line(opened, series, roll_back(opened, series, to, reason=reason)))
        if data_again:
            after = {change.number for change in champions_in_order(read_series(opened, series).changes)}
            taken_back = [change.run_id for change in before if change.run_id and change.number not in after]
            say(f"{forget(opened, series, taken_back)} parts of the source are new again.")


def all_series_view(store: ObjectStore) -> View:
    """Return every series with its champion."""
    names = list_series(store)
    if not names:
        return [Text(f"No series has promoted a checkpoint in {store.uri} yet.")]
    made = table("series", "change", "promoted", "loss", "since", left=("promoted",))
    for name in names:
        record = read_series(store, name)
        latest = record.latest
        add_row(made, name, str(latest.number), _short(latest), _loss(record, latest), moment(latest.at))
    return [Text(f"In {store.uri}"), made]


def series_view(store: ObjectStore, name: str) -> View:
    """Return the history of a series, the decisions about its candidates, and what it has seen."""
    record, (data, _) = read_series(store, name), read_data(store, name)
    going_back = {change.number for change in champions_in_order(record.changes)}
    changes = table("", "change", "what", "to", "loss", "when", "by", "why", left=("what", "to", "by", "why"))
    for change in record.changes:
        mark = "●" if change.number == record.latest.number else "○" if change.number in going_back else " "
        what = change.kind if change.back_to is None else f"rollback to {change.back_to}"
        cells = (what, _short(change), _loss(record, change), moment(change.at), change.by, change.reason)
        add_row(changes, mark, str(change.number), *cells)
    decisions = table("run", "outcome", "when", "why", left=("outcome", "why"))
    for decision in read_decisions(store, name):
        add_row(decisions, decision.run_id, decision.outcome, moment(decision.at), decision.reason)
    state = {
        "series": name,
        "champion": f"{store.uri}/{record.latest.checkpoint}",
        "data seen": f"{len(data.seen):,} parts of the source" if data.seen else "nothing",
    }
    if data.pending is not None:
        state["under way"] = f"run {data.pending.run_id}; the next retrain goes on with it"
    parts: View = [facts(state), BLANK, changes, Text("● champion   ○ `relora rollback` goes back to it", style="dim")]
    return [*parts, BLANK, decisions] if decisions.row_count else parts


def all_series_record(store: ObjectStore) -> list[dict[str, Any]]:
    latest = [(name, read_series(store, name).latest) for name in list_series(store)]
    return [
        {"series": name, "champion": f"{store.uri}/{change.checkpoint}", **_plain(change)} for name, change in latest
    ]


def series_record(store: ObjectStore, name: str) -> dict[str, Any]:
    record, (data, _) = read_series(store, name), read_data(store, name)
    return {
        "series": name,
        "champion": f"{store.uri}/{record.latest.checkpoint}",
        "changes": [_plain(change) for change in record.changes],
        "decisions": [decision.model_dump(mode="json") for decision in read_decisions(store, name)],
        "data": data.model_dump(mode="json"),
    }


def change_line(store: ObjectStore, name: str, change: Change) -> str:
    """Return the result of a change in one line."""
    done = "has" if change.back_to is None else f"is rolled back to change {change.back_to}: it has"
    return f"Series {name} {done} promoted {store.uri}/{change.checkpoint} (change {change.number})."


def _plain(change: Change) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(change.model_dump_json())
    return plain


def _short(change: Change) -> str:
    run_id = change.checkpoint.split("/")[1]
    return f"{run_id}@{change.stage}"


def _loss(record: SeriesRecord, change: Change) -> str:
    """Return the champion's loss when it was promoted, also if a rollback has made it champion again."""
    promotion = change if change.back_to is None else record.changes[change.back_to - 1]
    return decimal(promotion.scores.candidate_loss if promotion.scores else None, 4)
