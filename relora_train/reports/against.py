"""Two runs side by side: their results, their curves, and every setting in which they differ, on one page."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.reports.charts import Chart, Curve
from relora_train.reports.ranks.measures import json_value
from relora_train.reports.render import TEMPLATES, render
from relora_train.reports.report import StoredReport, read_run, report_prefix, report_run
from relora_train.reports.run_data import RunData
from relora_train.reports.text import change, final_evaluation, flops_text, score
from relora_train.reports.training_charts import training_charts
from relora_train.reports.work import machine_text
from relora_train.settings.keys import flatten
from relora_train.storage.base import ObjectStore
from relora_train.text import MISSING, count, duration, markdown_cell, size

__all__ = ["StoredReport", "report_against", "report_run"]

Evaluations = Callable[[Sequence[CheckpointRef]], list[dict[str, Any]]]


def report_against(
    line: Sequence[CheckpointRef], other: Sequence[CheckpointRef], scored: Evaluations, store: ObjectStore
) -> StoredReport:
    """Write the comparison of two lines to runs/<run of the first>/report/; `scored` reads a line's evaluations."""
    data, theirs = (read_run(it, scored(it), it[-1].manifest.run_id, spectra=False) for it in (line, other))
    name = f"{report_prefix(data.run_id)}/against-{theirs.run_id}.html"
    store.put_bytes(name, compare_page(data, theirs).encode())
    sides = side_by_side(data, theirs)
    summary = {
        "runs": [data.run_id, theirs.run_id],
        "results": {name: list(values) for name, *values in sides},
        "settings": {key: list(values) for key, *values in differing(data, theirs)},
    }
    sentence = markdown_cell(f"{data.run_id} and {theirs.run_id}: {sides[0][0]} {sides[0][1]} and {sides[0][2]}")
    return StoredReport(f"{store.uri}/{name}", (), json_value(summary), f"{sentence}\n")


def compare_page(data: RunData, theirs: RunData) -> str:
    """Return the whole page. Stages that are shaded are the longer run's."""
    longer = max((data, theirs), key=lambda one: one.stages[-1].end_step - one.stages[0].start_step)
    first = min(data.stages[0].start_step, theirs.stages[0].start_step)
    stages = (replace(longer.stages[0], start_step=first), *longer.stages[1:])
    return render(
        TEMPLATES / "against.html",
        data=data,
        theirs=theirs,
        stages=stages,
        longer=longer,
        sides=side_by_side(data, theirs),
        differing=differing(data, theirs),
        charts=paired_charts(data, theirs),
        with_charts=True,
    )


def side_by_side(data: RunData, theirs: RunData) -> list[tuple[str, str, str, str]]:
    """Return name, the first run's value, the second's, and the change from the second to the first."""
    rows: list[tuple[str, str, str, str]] = []
    finals = (final_evaluation(data), final_evaluation(theirs))
    for measure in (data.measures.headline, data.measures.second):
        pairs = [(f"{measure.name.capitalize()} in training", data.stages[-1].after, theirs.stages[-1].after)]
        if finals[0] and finals[1]:
            pairs.insert(0, (f"Validation {measure.name}", finals[0].scores, finals[1].scores))
        for name, one, two in pairs:
            rows.append((name, score(one, measure), score(two, measure), change(two.of(measure), one.of(measure))))
    numbers: tuple[tuple[str, Callable[[RunData], float | None], Callable[[float | None], str]], ...] = (
        ("Steps", lambda one: one.stages[-1].end_step - one.stages[0].start_step, count),
        ("Tokens", lambda one: _sum([row.tokens for row in one.stages]), count),
        ("Merges", lambda one: len(one.merges), count),
        ("Rank", lambda one: next((row.rank for row in reversed(one.stages) if row.rank), None), count),
        ("Time in stages", lambda one: sum(row.seconds for row in one.stages), duration),
        ("Tokens per second", lambda one: _last(one, "tokens_per_second"), count),
        ("FLOP/s", lambda one: _last(one, "flops"), flops_text),
        ("Peak memory", lambda one: _last(one, "peak_bytes"), size),
    )
    for name, value, text in numbers:
        rows.append((name, text(value(data)), text(value(theirs)), change(value(theirs), value(data))))
    rows.append(("Method", data.method, theirs.method, ""))
    rows.append(("Machine", machine_text(data.stages[-1].work), machine_text(theirs.stages[-1].work), ""))
    rows.append(("Dataset", data.dataset_id[:16], theirs.dataset_id[:16], ""))
    return rows


def differing(data: RunData, theirs: RunData) -> list[tuple[str, str, str]]:
    """Return the settings that are not the same: key and both values, a dash for one that a run does not have."""
    ours, others = (flatten(dict(one.settings)) for one in (data, theirs))
    return [
        (key, str(ours.get(key, MISSING)), str(others.get(key, MISSING)))
        for key in sorted({*ours, *others})
        if ours.get(key, MISSING) != others.get(key, MISSING)
    ]


def paired_charts(data: RunData, theirs: RunData) -> list[Chart]:
    """Return each chart that both runs have, with one strong curve of each: the first run's, then the second's."""
    second = {chart.title: chart for chart in training_charts(theirs)}
    charts = []
    for chart in training_charts(data):
        if chart.title == "Gradient norm" or chart.title not in second:
            continue
        curves = []
        for one, it, colour in ((data, chart, "c0"), (theirs, second[chart.title], "c1")):
            shown = next(curve for curve in it.curves if curve.label and "hollow" not in curve.look)
            if "points" in shown.look:
                curves.append(Curve("", shown.x, shown.y, f"{colour} faint"))
            curves.append(replace(shown, label=one.run_id, look=shown.look.replace("c0", colour)))
        highest = max(filter(None, (chart.highest, second[chart.title].highest)), default=None)
        marks: tuple[int, ...] = ()
        charts.append(replace(chart, curves=curves, caption="", highest=highest, marks=marks))
    return charts


def _last(data: RunData, name: str) -> float | None:
    work = data.stages[-1].work
    value: float | None = getattr(work, name) if work else None
    return value


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
