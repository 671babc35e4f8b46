"""`relora retrain`: run the flow `retrain` here and show what it came to."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from relora_train.checkpoints.series_record import check_series
from relora_train.cli.options import AsJson, ProfileName, SeriesName, Sets, Store, Verbose, open_named
from relora_train.cli.output import console_for_people
from relora_train.cli.run import run_shown
from relora_train.cli.summary import place
from relora_train.cli.tables import facts
from relora_train.runs.retraining.options import retrain_options
from relora_train.runs.retraining.summary import RetrainSummary
from relora_train.settings import load as profiles


def retrain(
    series: SeriesName,
    profile: ProfileName,
    sets: Sets = None,
    cycles: Annotated[int, typer.Option(min=1, help="Cycles added to the champion's.")] = 1,
    margin: Annotated[float, typer.Option(min=0, help="By how much the validation loss must fall.")] = 0.0,
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
    store: Store = None,
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
    }
    check_series(series)
    profiles.load_profile(profile, sets or ())
    retrain_options(**options)
    opened = open_named(store)
    opened.preflight()
    parameters = {
        "series": series,
        "profile": profile,
        "overrides": dict(profiles.parse_override(text) for text in sets or ()),
        "store": opened.uri,
        **options,
    }
    console = console_for_people(to_stderr=as_json)
    summary: RetrainSummary = run_shown("retrain", parameters, (), console, verbose=verbose)
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
        return
    told = {
        "series": summary.series,
        "outcome": f"{summary.outcome}: {summary.reason}",
        "champion": summary.champion_uri,
        "candidate": summary.candidate_uri,
        "report": place(summary.report_uri) if summary.report_uri else None,
    }
    console.print()
    console.print(facts({name: value for name, value in told.items() if value}), soft_wrap=True, highlight=False)
