"""`relora retrain`, `series` and `promote`: models that are retrained as their data grows."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train.checkpoints.lease import hold_series
from relora_train.checkpoints.series import list_series, read_series, roll_back
from relora_train.checkpoints.series import promote as promote_checkpoint
from relora_train.checkpoints.series_record import Change, SeriesRecord, champions_in_order, check_series
from relora_train.cli.options import (
    AsJson,
    Include,
    Limit,
    Pages,
    ProfileName,
    SeriesName,
    Sets,
    Store,
    Verbose,
    answer,
    open_named,
    overrides_of,
    resolve,
)
from relora_train.cli.output import BLANK, View, facts, place, say, table
from relora_train.cli.run import run_shown
from relora_train.errors import ConfigError
from relora_train.runs.retraining.interface import RetrainSummary, retrain_options
from relora_train.runs.retraining.series_data import forget, read_data, read_decisions
from relora_train.runs.task_scores import check_tasks
from relora_train.settings.load import load_profile
from relora_train.storage.base import ObjectStore
from relora_train.text import decimal, moment


def retrain(
    series: SeriesName,
    profile: ProfileName,
    sets: Sets = None,
    cycles: Annotated[int, typer.Option(min=1, help="Cycles added to the champion's.")] = 1,
    margin: Annotated[
        float, typer.Option(min=0, help="By how much the loss must fall, or the gate's score rise.")
    ] = 0.0,
    absolute: Annotated[
        bool, typer.Option("--absolute", help="The margin is in nats per token, not a share of the champion's loss.")
    ] = False,
    old_data_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the training text that is old data mixed in; below 1.")
    ] = 0.25,
    fresh_warm_start: Annotated[
        bool, typer.Option("--fresh-warm-start", help="Train the whole plan anew on all data.")
    ] = False,
    retry_refused: Annotated[
        bool, typer.Option("--retry-refused", help="A refused candidate's data stays new for the next retrain.")
    ] = False,
    gate: Annotated[
        str | None,
        typer.Option(metavar="TASK/METRIC", help="Decide by this score of lm-evaluation-harness; higher is better."),
    ] = None,
    include: Include = None,
    limit: Limit = None,
    store: Store = None,
    pages: Pages = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train a series on what its source holds more than last time; promote the result if it is better."""
    options: dict[str, Any] = {
        "cycles": cycles,
        "margin": margin,
        "margin_kind": "absolute" if absolute else "relative",
        "old_data_ratio": old_data_ratio,
        "fresh_warm_start": fresh_warm_start,
        "retry_refused": retry_refused,
        "gate": gate,
        "gate_include": str(Path(include).absolute()) if include else None,
        "gate_limit": limit,
    }
    check_series(series)
    load_profile(profile, sets or ())
    if measure := retrain_options(**options).measure:
        check_tasks(measure.selection)
    opened = open_named(store)
    opened.preflight()
    where = {"series": series, "profile": profile, "overrides": overrides_of(sets), "store": opened.uri}
    run_shown("retrain", where | options, view=_outcome_view, pages=pages, as_json=as_json, verbose=verbose)


def _outcome_view(summary: RetrainSummary, seconds: float) -> View:
    told = {
        "series": summary.series,
        "outcome": f"{summary.outcome}: {summary.reason}",
        "champion": summary.champion_uri,
        "candidate": summary.candidate_uri,
        "report": place(summary.report_uri) if summary.report_uri else None,
    }
    return [BLANK, facts({name: value for name, value in told.items() if value})]


def series(
    name: Annotated[str | None, typer.Argument(metavar="SERIES", help="Its history; all series when absent.")] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the series of a store with what they have promoted, or show the history of one."""
    opened = open_named(store)
    if name:
        _show_history(opened, name, as_json=as_json)
        return
    records = {each: read_series(opened, each) for each in list_series(opened)}
    champions = {each: record.latest for each, record in records.items()}
    shown = [
        {"series": each, "champion": f"{opened.uri}/{change.checkpoint}", **change.model_dump(mode="json")}
        for each, change in champions.items()
    ]
    columns = ("series", "change", "promoted", "loss", "since")
    rows = [
        (each, str(change.number), _short(change), _loss(records[each], change), moment(change.at))
        for each, change in champions.items()
    ]
    view: View = [Text(f"In {opened.uri}"), table(columns, rows, left=("promoted",))]
    answer(
        as_json, shown, lambda: view if rows else [Text(f"No series has promoted a checkpoint in {opened.uri} yet.")]
    )


def promote(
    series: SeriesName,
    checkpoint: Annotated[
        str | None, typer.Argument(help="Any name of a checkpoint, as for `relora show`; none with --rollback.")
    ] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Make the champion before this one the champion again.")
    ] = False,
    to: Annotated[int | None, typer.Option(min=1, help="Number of the change that --rollback goes back to.")] = None,
    data_again: Annotated[
        bool,
        typer.Option("--data-again", help="With --rollback: what was taken back was trained on is new data again."),
    ] = False,
    reason: Annotated[str | None, typer.Option(help="For the history.")] = None,
    store: Store = None,
) -> None:
    """Make a checkpoint the champion of a series, or go back to an earlier one; the next retrain goes on from it."""
    if (checkpoint is None) is not rollback:
        raise ConfigError("Name the CHECKPOINT to promote, or write --rollback to go back to an earlier champion.")
    opened = open_named(store)
    if checkpoint is not None:
        if to is not None or data_again:
            raise ConfigError("--to and --data-again go with --rollback. Leave them out to promote a checkpoint.")
        ref = resolve(checkpoint, opened.uri)
        _say_change(opened, series, promote_checkpoint(opened, series, ref, reason=reason or "promoted by hand"))
        return
    with hold_series(opened, series) if data_again else nullcontext():  # refuses while a retrain is under way
        before = champions_in_order(read_series(opened, series).changes)
        _say_change(opened, series, roll_back(opened, series, to, reason=reason or "rolled back by hand"))
        if data_again:
            after = {change.number for change in champions_in_order(read_series(opened, series).changes)}
            taken_back = [change.run_id for change in before if change.run_id and change.number not in after]
            say(f"{forget(opened, series, taken_back)} parts of the source are new again.")


def _show_history(store: ObjectStore, name: str, *, as_json: bool) -> None:
    """Show the history of a series, the decisions about its candidates, and what it has seen."""
    record, (data, _), decisions = read_series(store, name), read_data(store, name), read_decisions(store, name)
    champion = f"{store.uri}/{record.latest.checkpoint}"
    going_back = {change.number for change in champions_in_order(record.changes)}
    changes = [
        (
            "●" if change.number == record.latest.number else "○" if change.number in going_back else " ",
            str(change.number),
            change.kind if change.back_to is None else f"rollback to {change.back_to}",
            _short(change),
            _loss(record, change),
            moment(change.at),
            change.by,
            change.reason,
        )
        for change in record.changes
    ]
    columns = ("", "change", "what", "to", "loss", "when", "by", "why")
    state = {
        "series": name,
        "champion": champion,
        "data seen": f"{len(data.seen):,} parts of the source" if data.seen else "nothing",
    }
    if data.pending is not None:
        state["under way"] = f"run {data.pending.run_id}; the next retrain goes on with it"
    parts: View = [facts(state), BLANK, table(columns, changes, left=("what", "to", "by", "why"))]
    parts.append(Text("● champion   ○ `relora promote --rollback` goes back to it", style="dim"))
    if decisions:
        made = [(it.run_id, it.outcome, moment(it.at), it.reason) for it in decisions]
        parts += [BLANK, table(("run", "outcome", "when", "why"), made, left=("outcome", "why"))]
    shown = {
        "series": name,
        "champion": champion,
        "changes": [change.model_dump(mode="json") for change in record.changes],
        "decisions": [decision.model_dump(mode="json") for decision in decisions],
        "data": data.model_dump(mode="json"),
    }
    answer(as_json, shown, lambda: parts)


def _say_change(store: ObjectStore, name: str, change: Change) -> None:
    done = "has" if change.back_to is None else f"is rolled back to change {change.back_to}: it has"
    say(f"Series {name} {done} promoted {store.uri}/{change.checkpoint} (change {change.number}).")


def _short(change: Change) -> str:
    return f"{change.checkpoint.split('/')[1]}@{change.stage}"


def _loss(record: SeriesRecord, change: Change) -> str:
    """Return the champion's loss when it was promoted, also if a rollback has made it champion again."""
    promotion = change if change.back_to is None else record.changes[change.back_to - 1]
    return decimal(promotion.scores.candidate_loss if promotion.scores else None, 4)
