"""`relora retrain`: run the flow `retrain` here and show what it came to. Imports no torch and no Prefect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from relora_train.checkpoints.series_record import check_series
from relora_train.cli.run import run_shown
from relora_train.cli.summary import place
from relora_train.cli.tables import facts
from relora_train.runs.retraining.options import retrain_options
from relora_train.runs.retraining.summary import RetrainSummary
from relora_train.runs.run import default_store_uri
from relora_train.settings import load as profiles
from relora_train.storage.opening import open_store


def retrain_series(
    series: str,
    profile: str,
    sets: Sequence[str],
    options: Mapping[str, Any],
    *,
    store_uri: str | None,
    console: Console,
    verbose: bool,
) -> RetrainSummary:
    """Run the flow `retrain` and return its summary; what can be refused is refused before anything starts.

    Raises the library's own errors, TrainerInterruptedError after Ctrl-C; exits with 143 after SIGTERM.
    """
    check_series(series)
    profiles.load_profile(profile, sets)
    retrain_options(**options)
    store = open_store(store_uri or default_store_uri())
    store.preflight()
    parameters = {
        "series": series,
        "profile": profile,
        "overrides": dict(profiles.parse_override(text) for text in sets),
        "store": store.uri,
        **options,
    }
    summary: RetrainSummary = run_shown("retrain", parameters, (), console=console, verbose=verbose)
    return summary


def print_retrain(console: Console, summary: RetrainSummary) -> None:
    """What it came to, and where everything lies."""
    told = {
        "series": summary.series,
        "outcome": f"{summary.outcome}: {summary.reason}",
        "champion": summary.champion_uri,
        "candidate": summary.candidate_uri,
        "report": place(summary.report_uri) if summary.report_uri else None,
    }
    console.print(Text(""))
    console.print(facts({name: value for name, value in told.items() if value}), soft_wrap=True, highlight=False)
