"""`relora evaluate`, `report` and `retry`: what one checkpoint, or one run, comes to when it is looked at again."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train import events
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.cli.options import AsJson, CheckpointName, Include, Limit, RunName, Store, answer, resolve
from relora_train.cli.output import BLANK, View, console_for_people, facts, place, samples_lines, task_table, tell
from relora_train.cli.progress import shown_progress
from relora_train.errors import AccessDeniedError, ConfigError
from relora_train.runs.evaluations import recorded_evaluations, score_checkpoint
from relora_train.runs.retry import RetryOutcome, parent_of, retry_stage
from relora_train.runs.run import line_of
from relora_train.runs.task_scores import check_tasks, score_by_tasks
from relora_train.settings.objectives import LOSS, measures_in
from relora_train.settings.tasks import TaskSelection
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import cache_root


def evaluate(
    checkpoint: CheckpointName,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Score it by these tasks of lm-evaluation-harness instead.")
    ] = None,
    include: Include = None,
    limit: Limit = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint on its dataset's validation split and sample from it; recorded scores are reused."""
    if tasks is None and (include or limit):
        raise ConfigError("--include and --limit are for the tasks of --tasks. Name some, or leave them out.")
    selection = (
        check_tasks(TaskSelection(tasks=tuple(map(str.strip, tasks.split(","))), include=include, limit=limit))
        if tasks
        else None
    )
    ref = resolve(checkpoint, store)
    with console_for_people(to_stderr=as_json).status(f"evaluating {ref.manifest.run_id}@{ref.manifest.stage} …"):
        if selection is not None:
            scored = score_by_tasks(ref, selection, on_event=lambda event: None)
            shown = task_table([score for record in scored.record["task_scores"] for score in record["scores"]])
            answer(as_json, {**scored.record, "reused": scored.reused}, lambda: [shown])
            return
        outcome = score_checkpoint(ref, on_event=lambda event: None)
    record, measures = outcome.record, measures_in(outcome.record)
    before = " (recorded before)" if outcome.reused else ""
    about = {
        "checkpoint": str(record["checkpoint_uri"]),
        **{m.name: m.text(record[m.key]) for m in (measures.headline, measures.second, LOSS)},
        f"{measures.unit}s scored": f"{record[measures.scored]:,}{before}",
    }
    answer(as_json, {**record, "reused": outcome.reused}, lambda: [facts(about), BLANK, *samples_lines(record)])


def report(
    run: RunName,
    against: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Compare with this run instead: results, curves, settings.")
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run again from its checkpoints and recorded evaluations, or compare it with another run."""
    ref, other = resolve(run, store), resolve(against, store) if against is not None else None
    with console_for_people(to_stderr=as_json).status("reading checkpoints and drawing …"):
        from relora_train.reports.against import StoredReport, report_against, report_run  # matplotlib

        def scored(line: Sequence[CheckpointRef]) -> list[dict[str, Any]]:
            return recorded_evaluations(open_store(line[-1].store_uri), line)

        line = line_of(ref)

        def write(target: ObjectStore) -> StoredReport:
            if other is None:
                return report_run(line, scored(line), target, ref.manifest.run_id)
            return report_against(line, line_of(other), scored, target)

        try:
            written = write(open_store(ref.store_uri))
        except AccessDeniedError as error:  # a store that can only be read
            tell(f"The report is kept on this machine: {error}")
            written = write(open_store(cache_root() / "reports"))
    record = {"report_uri": written.html_uri, "picture_uris": written.picture_uris, "summary": written.summary}
    link = [Text(f"Link:   {written.link}")] if written.link else []
    answer(as_json, {**record, "link": written.link}, lambda: [Text(f"Report: {place(written.html_uri)}"), *link])


def retry(
    checkpoint: CheckpointName,
    replace: Annotated[
        bool, typer.Option("--replace", help="If it comes out otherwise, let the run go on from the new attempt.")
    ] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint's stage again from its parent, compare the bytes, and say what becomes of its descendants."""
    ref = resolve(checkpoint, store)
    parent_of(ref)  # refuses before anything is said to be trained
    stage, console = ref.manifest.stage, console_for_people(to_stderr=as_json)
    with shown_progress(console, [stage], first=f"training {stage} of {ref.manifest.run_id} once more"):
        outcome = retry_stage(ref, on_event=lambda event: events.emit(**event), replace=replace)
    record = {
        "checkpoint_uri": ref.uri,
        "identical": outcome.identical,
        "differing_files": list(outcome.differing_files),
        "evaluation": outcome.evaluation,
        "descendant_uris": [below.uri for below in outcome.descendants],
        "replacement_uri": outcome.replacement.uri if outcome.replacement else None,
    }
    answer(as_json, record, lambda: retry_view(outcome))


def retry_view(outcome: RetryOutcome) -> View:
    """Return the verdict, and what follows from it."""
    ref, manifest = outcome.checkpoint, outcome.checkpoint.manifest
    name, below = f"{manifest.run_id}@{manifest.stage}", outcome.descendants
    if outcome.identical:
        kept = f" What was trained from it ({len(below)}) stays valid." if below else ""
        return [Text(f"{name} came out identical, byte for byte: nothing changes.{kept}")]
    headline = measures_in(manifest.evaluation).headline
    scores = headline.arrow(manifest.evaluation.get(headline.key), outcome.evaluation.get(headline.key))
    lines = [
        f"{name} came out otherwise: {', '.join(outcome.differing_files)}.",
        f"Validation {headline.name}, committed → new: {scores}.",
    ]
    if outcome.replacement is None:
        again = "; --replace makes the run go on from a new attempt"
        lines.append(f"The committed checkpoint stays the run's, and the new attempt was dropped{again}.")
        resting = "Still resting on it:"
    else:
        lines.append(f"The run goes on from {outcome.replacement.uri}.")
        lines.append(f"The checkpoint it replaces is kept off the run's line: {ref.uri}")
        resting = "So is what was trained from that one; the run's own command makes its stages again:"
    if below:
        lines += [resting, *(f"  {one.manifest.run_id}@{one.manifest.stage}: {one.uri}" for one in below)]
    return [Text("\n".join(lines))]
