"""Commands of a series of retrained models: series, promote, rollback."""

from __future__ import annotations

from typing import Annotated

import typer

from relora_train.cli.commands.options import AsJson, CheckpointName, SeriesName, Store, echo_json, open_named, resolve
from relora_train.cli.output import console_for_people, say


def series(
    name: Annotated[str | None, typer.Argument(metavar="SERIES", help="Its history; all series when absent.")] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the series of a store with what they have promoted, or show the history of one."""
    from relora_train.cli import series as console_series
    from relora_train.cli.tables import show as show_view

    opened = open_named(store)
    if as_json:
        echo_json(console_series.series_json(opened, name) if name else console_series.all_series_json(opened))
    else:
        view = console_series.series_view(opened, name) if name else console_series.all_series_view(opened)
        show_view(console_for_people(), view)


def promote(
    series: SeriesName,
    checkpoint: CheckpointName,
    reason: Annotated[str, typer.Option(help="For the history.")] = "promoted by hand",
    store: Store = None,
) -> None:
    """Make a checkpoint the champion of a series; the next retrain goes on from it."""
    from relora_train.checkpoints.series import promote as promote_checkpoint
    from relora_train.cli.series import change_line

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
    from relora_train.cli import series as console_series

    for line in console_series.roll_back_lines(open_named(store), series, to, reason=reason, data_again=data_again):
        say(line)
