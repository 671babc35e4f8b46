"""The HTML page of a comparison: the table, the differences, the curves, and the paper's numbers beside ours."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from relora_train.experiments.comparison_text import (
    arm_cells,
    arm_header,
    facts_line,
    headline,
    outcome_text,
    paper_text,
)
from relora_train.experiments.records import ArmResult, Comparison, RunResult
from relora_train.reports.html import Cell, Html, details, escape, figure, note, table
from relora_train.reports.page import page
from relora_train.reports.rank_sections import Pictures
from relora_train.reports.statistics import Estimate
from relora_train.reports.text import MISSING, count, decimal, duration, estimate_text, signed_estimate_text, size
from relora_train.settings.measures import LOSS, Measure

_CAPTIONS = {
    "training_loss.png": (
        "Training loss",
        "Mean over seeds in each of 120 shares of the tokens; the band is one standard error. The first steps may lie "
        "above the axis.",
    ),
    "validation_loss.png": (
        "Validation loss",
        "By the trainer, after every stage, on fewer sequences than the table; the band is one standard error.",
    ),
    "validation_score.png": (
        "Validation {score}",
        "By the trainer, after every stage; the band is one standard error.",
    ),
}


def render_comparison(data: Comparison, pictures: Pictures) -> str:
    """The whole page; the same input gives the same text."""
    sections = [
        ("results", "Results", _results(data)),
        ("differences", f"Differences from {data.label(data.reference)}", _differences(data)),
        ("paper", "The paper's numbers beside ours", _paper(data)),
        ("curves", "Curves", _curves(data, pictures)),
        ("resets", "First updates after a reset", _resets(data)),
        ("diverged", "Runs that diverged", _diverged(data)),
        ("arms", "Arms", _arms(data)),
        ("search", "How the settings were found", _search(data)),
        ("runs", "Runs", _runs(data)),
        ("settings", "Settings and versions", _settings(data)),
    ]
    header = Html(
        f'<header><p class="eyebrow">ReLoRA Train · experiment {escape(data.experiment)}</p>'
        f'<h1>{escape(data.title)}</h1><p class="lede">{escape(headline(data))}</p>'
        f'<p class="facts">{escape(facts_line(data))}</p></header>'
    )
    return page(data.experiment, header, [section for section in sections if section[2]])


def _curves(data: Comparison, pictures: Pictures) -> Html:
    shown = {name: caption for name, caption in _CAPTIONS.items() if name in pictures}
    score = data.measures.headline.name
    return Html("".join(figure(pictures[n], title.format(score=score), text) for n, (title, text) in shown.items()))


def _results(data: Comparison) -> Html:
    rows: list[Sequence[Cell]] = [_marked(arm_cells(data, row), row, data) for row in data.arms]
    seeds = (
        "Mean ± standard error over seeds. "
        if len(data.seeds) > 1
        else "One seed: no errors, and small differences mean nothing. "
    )
    text = (
        f"{seeds}Loss in nats per {data.measures.unit} and {data.measures.headline.name} on held-out "
        f"{data.measures.held_out}. Trained: parameters that move after the warm start. Tokens/s of training, without "
        "a warm start that an arm branched from; in all: with it. Memory: the most held while training. Time: of all "
        "stages, as if each arm had trained its warm start itself."
    )
    notes = [
        note(f"{', '.join(data.label(arm) for arm in arms)}: not reached by {key}, which they set themselves.")
        for key, arms in data.unreached.items()
    ]
    if any(row.trained and row.diverged for row in data.arms):
        notes.append(note("Where some runs diverged, means are over the others: they flatter the arm."))
    return Html(table(arm_header(data), rows) + note(text) + "".join(notes))


def _marked(cells: Sequence[str], row: ArmResult, data: Comparison) -> Sequence[Cell]:
    return (Html(f"<b>{escape(cells[0])}</b>"), *cells[1:]) if row.arm == data.reference else cells


def _differences(data: Comparison) -> Html:
    judged = data.measures.judged
    beside = data.measures.headline if judged == LOSS else LOSS
    rows: list[Sequence[Cell]] = []
    for difference in data.differences:
        if difference.arm != data.reference:
            value = difference.score(judged)
            rows.append(
                (
                    data.label(difference.arm),
                    _coloured(value, judged),
                    signed_estimate_text(difference.score(beside)),
                    count(value.count if value else 0),
                    _verdict(value, judged),
                )
            )
    if not rows:
        return Html("")
    text = (
        "The arm less the reference, seed by seed, then mean ± standard error: what a seed does to both cancels. "
        f"{'Higher' if judged.higher_is_better else 'Lower'} {judged.name} is better. Better or worse: its mean lies "
        "more than two standard errors from zero, over three pairs at least."
    )
    header = ("Arm", judged.name.capitalize(), beside.name.capitalize(), "Pairs", "")
    return Html(table(header, rows) + note(text))


def _coloured(value: Estimate | None, measure: Measure) -> Html:
    text = escape(signed_estimate_text(value))
    if value is None or not value.differs_from_zero():
        return text
    return Html(f'<span class="{_better_or_worse(value, measure)}">{text}</span>')


def _better_or_worse(value: Estimate, measure: Measure) -> str:
    return "better" if (value.mean > 0) == measure.higher_is_better else "worse"


def _verdict(value: Estimate | None, measure: Measure) -> str:
    if value is None:
        return "no pair finished"
    if value.standard_error is None:
        return "one pair: no error"
    if value.count < 3:
        return "too few pairs to tell"
    if not value.differs_from_zero():
        return "not told apart"
    return _better_or_worse(value, measure)


def _paper(data: Comparison) -> Html:
    if all(row.paper is None for row in data.arms):
        return Html("")
    headline = data.measures.headline
    reference = next(row for row in data.arms if row.arm == data.reference)
    rows = [
        (
            row.label,
            paper_text(row.paper),
            _ratio(row.paper, reference.paper),
            outcome_text(row) or estimate_text(row.score(headline)),
            _ratio(_mean(row, headline), _mean(reference, headline)),
        )
        for row in data.arms
    ]
    other = (
        ""
        if data.budget_tokens == data.full_budget_tokens
        else f" Here {count(data.budget_tokens)} tokens of the {count(data.full_budget_tokens)} that belong to it."
    )
    text = (
        f"{data.paper_source}: {data.paper_measure}. Ours is {headline.name} on our own held-out "
        f"{data.measures.held_out}: compare the ratios to {reference.label}, not the numbers.{other}"
    )
    return Html(table(("Arm", "Paper", "ratio", "Here", "ratio"), rows) + note(text))


def _mean(row: ArmResult, measure: Measure) -> float | None:
    score = row.score(measure)
    return score.mean if score else None


def _ratio(value: object, reference: object) -> str:
    both = isinstance(value, float) and isinstance(reference, float) and reference
    return decimal(value / reference, 3) if both else MISSING  # type: ignore[operator]  # floats, checked


def _resets(data: Comparison) -> Html:
    rows: list[Sequence[Cell]] = [
        (
            row.label,
            estimate_text(row.largest_first_change),
            estimate_text(row.first_change_ratio),
            estimate_text(row.largest_a_move),
            outcome_text(row) or "trained",
        )
        for row in data.arms
        if row.largest_first_change is not None or row.diverged
    ]
    if all(row.largest_first_change is None for row in data.arms):
        return Html("")
    text = (
        "Of the first five updates after a merge, before the learning rate has climbed back, the largest change of the "
        "wrapped weights relative to their norm; how many times the change by the last update before the merge that "
        "was; and the largest norm of a move of A, whose gradient is zero until B has moved: what the reset left in "
        "its moments shows there first. Each the largest over a run's cycles, then mean ± standard error over seeds. "
        "A cycle that diverged left no numbers here: its message below has them."
    )
    return Html(table(("Arm", "Change of W", "times the last", "A moved by", ""), rows) + note(text))


def _diverged(data: Comparison) -> Html:
    items = []
    for run in (run for run in data.runs if run.outcome == "diverged"):
        what = run.message.partition(" and nothing")[0]  # what follows is advice for a run by itself
        items.append(
            f"<li><b>{escape(data.label(run.arm))}, seed {run.seed}</b><br><small>{escape(what)}.</small></li>"
        )
    if not items:
        return Html("")
    text = "A run that diverged commits nothing of that stage, and is not made again with the same settings."
    return Html(f'<ul class="lineage">{"".join(items)}</ul>{note(text)}')


def _arms(data: Comparison) -> Html:
    rows: list[Sequence[Cell]] = []
    for row in data.arms:
        changes = _flat(data.changes.get(row.arm, {}))
        shown = " · ".join(f"{key} = {value}" for key, value in changes.items()) or "the base as it is"
        rows.append((row.label, count(row.parameters), count(row.trainable_parameters)))
        rows.append((Html(f"{escape(row.about)} <code>{escape(shown)}</code>"),))
    base = " · ".join(f"{key} = {value}" for key, value in _flat(data.base).items())
    common = Html(f'<p class="note">The base is profile {escape(data.profile)} with <code>{escape(base)}</code></p>')
    return Html(table(("Arm", "Parameters", "Trained"), rows) + (common if data.base else ""))


def _search(data: Comparison) -> Html:
    if not data.search:
        return Html("")
    text = "What was tried before the runs above and what it came to, as the experiment's file has it."
    return Html(table(("Tried", "Result"), list(data.search.items()), prose=True) + note(text))


def _runs(data: Comparison) -> Html:
    headline = data.measures.headline
    rows: list[Sequence[Cell]] = []
    for run in data.runs:
        rows.append(
            (
                f"{data.label(run.arm)}, seed {run.seed}",
                decimal(run.val_loss, 4),
                decimal(getattr(run, headline.key), headline.digits) if run.outcome == "trained" else "diverged",
                count(run.tokens_per_second),
                size(run.peak_memory_bytes),
                duration(run.seconds),
            )
        )
        rows.append((Html(f"{_lowered(run)}<code>{escape(run.checkpoint_uri or run.run_id)}</code>"),))
    return details("Every run", table(("Run", "Loss", headline.name.capitalize(), "Tokens/s", "Memory", "Time"), rows))


def _lowered(run: RunResult) -> Html:
    return Html("".join(f"{escape(text)}. " for text in run.lowered))


def _settings(data: Comparison) -> Html:
    command = f"relora compare {data.command_name or data.experiment} --seeds {','.join(map(str, data.seeds))}"
    sets = "".join(
        f" --set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in _flat(data.overrides).items()
    )
    versions = next((run.versions for run in data.runs if run.versions), {})
    shown = table(("Package", "Version"), sorted(versions.items())) if versions else note("Not recorded.")
    return Html(f"<p><code>{escape(command + sets)}</code></p>" + details("Versions", shown))


def _flat(settings: object, prefix: str = "") -> dict[str, object]:
    """'section.key' -> value of nested sections."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    found: dict[str, object] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found
