"""A comparison in words and numbers: what its page, its Markdown and the command line have in common."""

from __future__ import annotations

from typing import Literal

from relora_train.experiments.records import ArmResult, Comparison
from relora_train.reports.text import estimate_text, signed_estimate_text
from relora_train.text import MISSING, count, decimal, duration, markdown_cell, markdown_table, size

_NAMED = 5
"""Arms in the headline at most."""


def arm_header(data: Comparison) -> tuple[str, ...]:
    """Titles of the columns of arm_cells."""
    paper = ("Paper",) if _has_paper(data) else ()
    return (
        "Arm",
        "Loss",
        data.measures.headline.name.capitalize(),
        *paper,
        "Trained",
        "Tokens/s",
        "in all",
        "Memory",
        "Time",
        "Runs",
    )


def arm_cells(data: Comparison, row: ArmResult) -> tuple[str, ...]:
    """Return one row of the table of results."""
    paper = (paper_text(row.paper),) if _has_paper(data) else ()
    runs = row.trained + row.diverged
    return (
        row.label,
        estimate_text(row.val_loss) if row.val_loss else outcome_text(row),
        estimate_text(row.score(data.measures.headline)),
        *paper,
        _millions(row.trainable_parameters),
        count(row.tokens_per_second.mean if row.tokens_per_second else None),
        count(row.tokens_per_second_in_all.mean if row.tokens_per_second_in_all else None),
        size(round(row.peak_memory_bytes.mean)) if row.peak_memory_bytes else MISSING,
        duration(row.seconds.mean if row.seconds else None),
        f"{row.trained} of {runs}" if row.diverged else str(runs),
    )


def outcome_text(row: ArmResult) -> str:
    """Return 'diverged' or 'diverged 1 of 3'; '' for an arm that never did."""
    if not row.diverged:
        return ""
    return "diverged" if not row.trained else f"diverged {row.diverged} of {row.trained + row.diverged}"


def paper_text(value: float | Literal["diverged"] | None) -> str:
    return value if isinstance(value, str) else decimal(value, 2)


def headline(data: Comparison) -> str:
    """Return the result in one sentence: the arms from best to worst."""
    headline = data.measures.headline
    scored = [(row.label, score) for row in data.arms if (score := row.score(headline)) is not None]
    ranked = sorted(scored, key=lambda each: each[1].mean, reverse=headline.higher_is_better)
    parts = [f"{label} {estimate_text(score)}" for label, score in ranked]
    lost = [row.label for row in data.arms if row.diverged and not row.trained]
    if len(parts) > _NAMED:
        parts = [*parts[: _NAMED - 1], f"…, last of {len(parts)} {parts[-1]}"]
    told = f"Validation {headline.name}, best first: {', '.join(parts)}." if parts else "No arm was trained to its end."
    return f"{told} Diverged: {', '.join(lost)}." if lost else told


def facts_line(data: Comparison) -> str:
    """Base, budget, seeds and when the last run ended."""
    ends = [run.finished_at for run in data.runs if run.finished_at]
    end = f" · last run ended {max(ends):%Y-%m-%d %H:%M} UTC" if ends else ""
    seeds = f"seeds {', '.join(map(str, data.seeds))}" if len(data.seeds) > 1 else f"seed {data.seeds[0]}"
    base = data.profile.rpartition("/")[2].removesuffix(".toml")
    return f"base profile {base} · {count(data.budget_tokens)} tokens a run · {seeds}{end}"


def comparison_markdown(data: Comparison) -> str:
    """Return a heading, the result in one sentence, the table, the differences."""
    lines = markdown_table(arm_header(data), (arm_cells(data, row) for row in data.arms))
    judged = data.measures.judged
    differences = [
        f"- {markdown_cell(data.label(each.arm))}: {signed_estimate_text(each.score(judged))}"
        for each in data.differences
        if each.arm != data.reference and each.score(judged)
    ]
    reference = markdown_cell(data.label(data.reference))
    paired = (
        ["", f"{judged.name.capitalize()} less that of {reference}, paired by seed:", "", *differences]
        if differences
        else []
    )
    return "\n".join(
        [
            f"# {markdown_cell(data.title)}",
            "",
            markdown_cell(headline(data)),
            "",
            markdown_cell(facts_line(data)),
            "",
            *lines,
            *paired,
            "",
        ]
    )


def _has_paper(data: Comparison) -> bool:
    return any(row.paper is not None for row in data.arms)


def _millions(parameters: int | None) -> str:
    if parameters is None or parameters < 1_000_000:
        return count(parameters)
    return f"{parameters / 1e6:,.1f}M"
