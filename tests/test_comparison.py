"""From results of runs to a table and differences: which direction is better, and what a score of a task changes."""

from pathlib import Path

import pytest

from relora_train.errors import ExperimentInvalidError
from relora_train.experiments.comparison import compare_results, comparison_markdown
from relora_train.experiments.experiment import load_experiment
from relora_train.experiments.records import RunResult
from relora_train.experiments.report import draw_comparison, render_comparison
from relora_train.experiments.run_results import training_curve
from relora_train.settings.keys import settings_digest


def scored(arm: str, seed: int, accuracy: float) -> RunResult:
    return RunResult(
        arm=arm, seed=seed, run_id=f"{arm}-{seed}", outcome="trained", dataset_id="a" * 64, val_loss=accuracy,
        val_accuracy=accuracy, content="SHA-256 12ab",
    )  # fmt: skip


def test_a_higher_accuracy_is_better_and_a_higher_loss_is_not():
    """The losses here rise with the accuracy, so that whoever judged by them would say the opposite."""
    planned = load_experiment("images")
    found = [
        scored(arm, seed, base + seed / 1000) for seed in range(5) for arm, base in (("relora", 0.8), ("lora", 0.7))
    ]
    found += [scored("full", seed, 0.9 + (seed % 2) / 1000) for seed in range(5)]
    compared = compare_results(planned, found)
    assert {each.arm: each.val_accuracy and round(each.val_accuracy.mean, 6) for each in compared.differences} == {
        "full": pytest.approx(0.0984), "lora": -0.1, "lora-warm": None, "relora": 0.0,
    }  # fmt: skip
    html, text = render_comparison(compared, {}), comparison_markdown(compared)
    assert '<span class="better">+0.0984' in html and '<span class="worse">−0.1' in html
    assert "Validation accuracy, best first: Full rank 0.90040 ± 0.00024, ReLoRA 0.80200" in text
    assert "Accuracy less that of ReLoRA, paired by seed:" in text
    assert text.count(" · corpus SHA-256 12ab\n") == html.count(" · corpus SHA-256 12ab") == 1


def test_a_training_curve_is_the_mean_of_each_share_of_the_budget():
    import numpy as np

    tokens, loss = np.array([10.0, 20.0, 30.0, 1200.0]), np.array([4.0, np.nan, 2.0, 1.0])
    points = training_curve(tokens, loss, budget=1200)  # 120 shares of 10 tokens: (0, 10], (10, 20], …
    assert [(point.tokens, point.loss) for point in points] == [(5.0, 4.0), (25.0, 2.0), (1195.0, 1.0)]


TASK = """
title = "By a task"
profile = "smoke"
budget_tokens = 30_720
reference = "relora"
measure = { score = "MMLU/acc", include = "tasks", limit = 9 }
[arms.relora]
label = "ReLoRA"
[arms.lora]
label = "LoRA"
set.method = "lora"
"""


def by_task(arm: str, seed: int, score: float) -> RunResult:
    return RunResult(
        arm=arm, seed=seed, run_id=f"{arm}-{seed}", outcome="trained", dataset_id="a" * 64, val_loss=score,
        val_perplexity=2.0, task_score=score,
    )  # fmt: skip


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_arms_are_compared_by_the_measure_in_its_own_direction(tmp_path: Path, better: str):
    path = tmp_path / "mine.toml"
    path.write_text(TASK.replace("limit = 9", f'limit = 9, better = "{better}"'))
    planned = load_experiment(path)
    found = [
        by_task(arm, seed, base + seed / 1000) for seed in range(5) for arm, base in (("relora", 0.3), ("lora", 0.4))
    ]
    compared = compare_results(planned, found)
    html, text = render_comparison(compared, {}), comparison_markdown(compared)
    assert f'<span class="{"better" if better == "higher" else "worse"}">+0.1' in html
    first = "LoRA 0.4" if better == "higher" else "ReLoRA 0.3"
    assert f"MMLU/acc, best first: {first}" in text and "MMLU/acc less that of ReLoRA, paired by seed:" in text
    assert "Validation MMLU" not in text + html and "validation_score.png" not in draw_comparison(compared)


def test_a_measure_changes_no_run_and_no_place_of_other_reports(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(TASK)
    judged = load_experiment(path)
    assert {run.measure.include for run in judged.runs} == {str(tmp_path / "tasks")}
    path.write_text(TASK.replace("measure =", "# measure ="))
    plain = load_experiment(path)
    assert [run.run_id for run in plain.runs] == [run.run_id for run in judged.runs]
    assert {run.measure for run in plain.runs} == {None} and plain.digest != judged.digest
    as_before = plain.config.model_dump(mode="json", exclude={"seeds", "measure"})
    evaluations = {run.run_id: run.profile.evaluation.model_dump(mode="json") for run in plain.runs}
    assert plain.digest == settings_digest({"runs": evaluations, "config": as_before})[:8]


def test_a_measure_of_images_or_without_a_metric_is_a_fault_of_the_file(tmp_path: Path):
    path = tmp_path / "mine.toml"
    for change, said in (
        (("MMLU/acc", "MMLU"), "measure.score"),
        (
            ('"smoke"', '"digits"'),
            "measure: tasks are for language models, and the objective is 'image_classification'",
        ),
    ):
        path.write_text(TASK.replace(*change))
        with pytest.raises(ExperimentInvalidError) as refused:
            load_experiment(path)
        assert said in str(refused.value)
