"""From the runs of an experiment to a table over seeds and paired differences, and these in words. Pure."""

import math
from collections.abc import Sequence
from typing import Literal

from relora_train.errors import RunSettingsChangedError
from relora_train.experiments.experiment import Experiment
from relora_train.experiments.records import ArmResult, Comparison, Difference, RunResult
from relora_train.reports.statistics import Estimate, estimate, paired_difference
from relora_train.reports.text import estimate_text, signed_estimate_text
from relora_train.settings.objectives import SCORES
from relora_train.text import MISSING, capitalized, count, decimal, duration, markdown_cell, markdown_table, size

_AVERAGED = (*SCORES, "task_score", "tokens_per_second", "tokens_per_second_in_all", "peak_memory_bytes", "seconds")
_ARMS_IN_HEADLINE = 5


def compare_results(experiment: Experiment, results: Sequence[RunResult]) -> Comparison:
    """Return the table and the differences.

    Raises RunSettingsChangedError for arms that were trained on different datasets: they cannot be compared.
    """
    by_dataset: dict[str, list[str]] = {}
    for result in results:
        if result.dataset_id is not None:
            by_dataset.setdefault(result.dataset_id, []).append(result.run_id)
    if len(by_dataset) > 1:
        shown = "".join(f"\n  - {dataset[:12]}: {', '.join(runs)}" for dataset, runs in by_dataset.items())
        raise RunSettingsChangedError(
            f"The arms were trained on different data, so they cannot be compared (dataset: runs):{shown}\n"
            "The source changed between two runs of the experiment. Run it in another store, or delete the runs on the "
            "data that is gone."
        )
    config = experiment.config
    of_experiment = ("command_name", "profile", "digest", "budget_tokens", "seeds")
    return Comparison(
        experiment=experiment.name,
        objective=experiment.runs[0].profile.objective,
        full_budget_tokens=config.budget_tokens,
        overrides=dict(experiment.overrides),
        unreached=dict(experiment.unreached),
        changes={name: arm.set for name, arm in config.arms.items()},
        arms=tuple(_arm_result(name, experiment, results) for name in config.arms),
        differences=tuple(_difference(name, config.reference, results) for name in config.arms),
        runs=tuple(results),
        **{name: getattr(experiment, name) for name in of_experiment},
        **config.model_dump(
            include={"title", "reference", "paper_source", "paper_measure", "base", "search", "measure"}
        ),
    )


def _arm_result(name: str, experiment: Experiment, results: Sequence[RunResult]) -> ArmResult:
    config = experiment.config.arms[name]
    of_arm = [result for result in results if result.arm == name]
    trained = [result for result in of_arm if result.outcome == "trained"]
    resets = [result.resets for result in of_arm if result.resets]  # of those that diverged later, too
    ratios = [[size.ratio for size in sizes if size.ratio is not None] for sizes in resets]

    def over_seeds(field: str) -> Estimate | None:
        values = [getattr(result, field) for result in trained]
        return estimate([float(value) for value in values if value is not None and math.isfinite(value)])

    return ArmResult(
        arm=name,
        label=config.label,
        about=config.about,
        paper=config.paper,
        trained=len(trained),
        diverged=len(of_arm) - len(trained),
        **{field: over_seeds(field) for field in _AVERAGED},
        largest_first_change=estimate([max(size.largest_change for size in sizes) for sizes in resets]),
        first_change_ratio=estimate([max(found) for found in ratios if found]),
        largest_a_move=estimate([max(size.largest_a_move for size in sizes) for sizes in resets]),
        trainable_parameters=of_arm[0].trainable_parameters if of_arm else None,
        parameters=of_arm[0].parameters if of_arm else None,
    )


def _difference(arm: str, reference: str, results: Sequence[RunResult]) -> Difference:
    def by_seed(name: str, field: str) -> dict[int, float]:
        trained = [result for result in results if result.arm == name and result.outcome == "trained"]
        return {one.seed: getattr(one, field) for one in trained if getattr(one, field) is not None}

    fields = [name for name in (*SCORES, "task_score") if name in Difference.model_fields]
    return Difference(arm=arm, **{it: paired_difference(by_seed(arm, it), by_seed(reference, it)) for it in fields})


def arm_header(data: Comparison) -> tuple[str, ...]:
    """Titles of the columns of arm_cells."""
    paper = ("Paper",) if _has_paper(data) else ()
    score = capitalized(data.measures.headline.name)
    return ("Arm", "Loss", score, *paper, "Trained", "Tokens/s", "in all", "Memory", "Time", "Runs")


def arm_cells(data: Comparison, row: ArmResult) -> tuple[str, ...]:
    """Return one row of the table of results."""
    trained, runs = row.trainable_parameters, row.trained + row.diverged
    return (
        row.label,
        estimate_text(row.val_loss) if row.val_loss else outcome_text(row),
        estimate_text(row.score(data.measures.headline)),
        *((paper_text(row.paper),) if _has_paper(data) else ()),
        count(trained) if trained is None or trained < 1_000_000 else f"{trained / 1e6:,.1f}M",
        count(row.tokens_per_second.mean if row.tokens_per_second else None),
        count(row.tokens_per_second_in_all.mean if row.tokens_per_second_in_all else None),
        size(round(row.peak_memory_bytes.mean)) if row.peak_memory_bytes else MISSING,
        duration(row.seconds.mean if row.seconds else None),
        f"{row.trained} of {runs}" if row.diverged else str(runs),
    )


def _has_paper(data: Comparison) -> bool:
    return any(row.paper is not None for row in data.arms)


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
    if len(parts) > _ARMS_IN_HEADLINE:
        parts = [*parts[: _ARMS_IN_HEADLINE - 1], f"…, last of {len(parts)} {parts[-1]}"]
    told = f"{data.headline_name}, best first: {', '.join(parts)}." if parts else "No arm was trained to its end."
    return f"{told} Diverged: {', '.join(lost)}." if lost else told


def facts_line(data: Comparison) -> str:
    """Base, budget, seeds, corpus and when the last run ended."""
    ends = [run.finished_at for run in data.runs if run.finished_at]
    end = f" · last run ended {max(ends):%Y-%m-%d %H:%M} UTC" if ends else ""
    seeds = f"seeds {', '.join(map(str, data.seeds))}" if len(data.seeds) > 1 else f"seed {data.seeds[0]}"
    base = data.profile.rpartition("/")[2].removesuffix(".toml")
    corpus = "".join({f" · corpus {run.content}": "" for run in data.runs if run.content})  # one: one dataset
    return f"base profile {base} · {count(data.budget_tokens)} tokens a run · {seeds}{corpus}{end}"


def comparison_markdown(data: Comparison) -> str:
    """Return a heading, the result in one sentence, the table, the differences."""
    lines = [f"# {markdown_cell(data.title)}", "", markdown_cell(headline(data)), "", markdown_cell(facts_line(data))]
    lines += ["", *markdown_table(arm_header(data), (arm_cells(data, row) for row in data.arms))]
    judged = data.measures.judged
    differences = [
        f"- {markdown_cell(data.label(each.arm))}: {signed_estimate_text(each.score(judged))}"
        for each in data.differences
        if each.arm != data.reference and each.score(judged)
    ]
    if differences:
        less = f"less that of {markdown_cell(data.label(data.reference))}, paired by seed:"
        lines += ["", f"{capitalized(judged.name)} {less}", "", *differences]
    return "\n".join([*lines, ""])
