"""`relora evaluate` and `relora report`."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from relora_train.cli.options import AsJson, CheckpointName, RunName, Store, answer, resolve
from relora_train.cli.output import console_for_people
from relora_train.cli.summary import place
from relora_train.cli.tables import BLANK, View, facts, samples_lines
from relora_train.runs.evaluations import recorded_evaluations, score_checkpoint
from relora_train.runs.run import line_of
from relora_train.settings.measures import LOSS
from relora_train.settings.objectives import measures_in
from relora_train.storage.opening import open_store


def evaluate(checkpoint: CheckpointName, store: Store = None, as_json: AsJson = False) -> None:
    """Score a checkpoint on its dataset's validation split and sample from it; recorded scores are reused."""
    ref = resolve(checkpoint, store)
    with console_for_people(to_stderr=as_json).status(f"evaluating {ref.manifest.run_id}@{ref.manifest.stage} …"):
        outcome = score_checkpoint(ref, on_event=lambda event: None)
    answer(
        as_json,
        record=lambda: {**outcome.record, "reused": outcome.reused},
        view=lambda: evaluation_view(outcome.record, reused=outcome.reused),
    )


def report(run: RunName, store: Store = None, as_json: AsJson = False) -> None:
    """Write the report of a run again from its checkpoints and recorded evaluations."""
    ref = resolve(run, store)
    with console_for_people(to_stderr=as_json).status("reading checkpoints and drawing …"):
        from relora_train.reports.report import report_run  # matplotlib

        opened, line = open_store(ref.store_uri), line_of(ref)
        written = report_run(line, recorded_evaluations(opened, line), opened, ref.manifest.run_id)
    answer(
        as_json,
        record=lambda: {
            "report_uri": written.html_uri,
            "picture_uris": written.picture_uris,
            "summary": written.summary,
        },
        view=lambda: [Text(f"Report: {place(written.html_uri)}")],
    )


def evaluation_view(record: dict[str, Any], *, reused: bool) -> View:
    """Scores and samples of one checkpoint."""
    measures = measures_in(record)
    about = facts(
        {
            "checkpoint": str(record["checkpoint_uri"]),
            **{m.name: m.text(record[m.key]) for m in (measures.headline, measures.second, LOSS)},
            f"{measures.unit}s scored": f"{record[measures.scored]:,}" + (" (recorded before)" if reused else ""),
        }
    )
    return [about, BLANK, *samples_lines(record)]
