"""The size of the first updates after a reset: measured as it is, and recorded where training waits anyway."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from stage_runs import ignore, metrics_of, run_all, stage_request, tiny_profile
from tiny_models import tiny_llama

from relora_train.errors import DivergedError
from relora_train.experiments.comparison import compare_results
from relora_train.experiments.experiment import load_experiment
from relora_train.experiments.records import RunResult
from relora_train.experiments.report import render_comparison
from relora_train.experiments.run_results import reset_sizes
from relora_train.method.layer import relora_layers
from relora_train.method.update_size import UpdateMeter, product_norm
from relora_train.method.wrap import apply_relora
from relora_train.reports.collect import train_curve
from relora_train.reports.run_data import RunData, Scores, StageRow
from relora_train.training.trainer import run_stage


def test_the_norm_of_a_product_is_that_of_the_product():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 6, generator=generator), torch.randn(6, 30, generator=generator)
    assert product_norm(left, right) == pytest.approx(float((left @ right).norm()), rel=1e-6)


def test_a_measured_update_is_the_difference_of_the_weights_it_stands_for():
    model = tiny_llama()
    apply_relora(model, rank=4, alpha=8, dropout=0.0, target_modules=None, seed=0)
    generator = torch.Generator().manual_seed(0)
    layers = [layer for _, layer in relora_layers(model)]
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.normal_(generator=generator)
        meter = UpdateMeter(model)
        meter.begin()
        before = [(layer.lora_A.clone(), layer.lora_B.clone()) for layer in layers]
        for layer in layers:
            layer.lora_A.add_(0.01 * torch.randn(layer.lora_A.shape, generator=generator))
            layer.lora_B.add_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))
        measured = meter.end()

        def total(values: list[torch.Tensor]) -> float:
            return math.sqrt(sum(float(value.double().square().sum()) for value in values))

        changes = [
            layer.scaling * (layer.lora_B @ layer.lora_A - B @ A) for layer, (A, B) in zip(layers, before, strict=True)
        ]
        expected = {
            "lora_A_update_norm": total([layer.lora_A - A for layer, (A, _) in zip(layers, before, strict=True)]),
            "lora_B_update_norm": total([layer.lora_B - B for layer, (_, B) in zip(layers, before, strict=True)]),
            "relative_weight_change": total(changes) / total([layer.weight for layer in layers]),
        }
    assert measured == pytest.approx(expected, rel=1e-4)


def test_a_cycle_records_its_first_updates_and_its_last(dataset: Path, tmp_path: Path):
    profile = tiny_profile(schedule={"cycle_length": 12}, logging={"every_steps": 1})
    for stage, checkpoint in run_all(profile, dataset, tmp_path).items():
        measured = [record["step"] for record in metrics_of(checkpoint) if "relative_weight_change" in record]
        first = metrics_of(checkpoint)[0]["step"]
        assert measured == ([] if stage == "warm-start" else [*range(first, first + 5), first + 11])
    at_rate_zero = metrics_of(tmp_path / "cycle-2")[0]
    assert at_rate_zero["learning_rate"] == at_rate_zero["relative_weight_change"] == 0


def moves_after_the_reset(dataset: Path, output: Path, **reset: object) -> list[float]:
    profile = tiny_profile(
        optimizer_reset=reset, optimizer={"learning_rate": 1e-3}, schedule={"restart_warmup_steps": 4}
    )
    checkpoint = run_all(profile, dataset, output)["cycle-2"]
    return [record["lora_A_update_norm"] for record in metrics_of(checkpoint)[:5]]


def test_independent_masks_show_in_the_first_updates(dataset: Path, tmp_path: Path):
    """Fault B2 of the official code, seen by the records that every cycle leaves."""
    joint = moves_after_the_reset(dataset, tmp_path / "joint", mode="magnitude", ratio=0.5)
    apart = moves_after_the_reset(dataset, tmp_path / "apart", mode="magnitude", ratio=0.5, independent_masks=True)
    assert max(apart) > 10 * max(joint) > 0


def test_a_restarted_clock_shows_in_the_first_updates(dataset: Path, tmp_path: Path):
    """With every entry emptied it is what 'zero' does; how large the updates are: tests/test_optimizer.py."""
    kept = moves_after_the_reset(dataset, tmp_path / "kept", mode="random", ratio=1.0)
    anew = moves_after_the_reset(dataset, tmp_path / "anew", mode="random", ratio=1.0, restart_clock=True)
    zero = moves_after_the_reset(dataset, tmp_path / "zero", mode="zero")
    assert anew == zero != kept


def test_a_stage_that_diverges_says_what_its_first_updates_did(dataset: Path, tmp_path: Path):
    profile = tiny_profile(optimizer={"learning_rate": 1e6, "warm_start_learning_rate": 1e-3})
    run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "warm"), ignore)
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "out", tmp_path / "warm")
    with pytest.raises(DivergedError, match=r"one changed the weights by (\d|nan|inf)\S* of their norm"):
        run_stage(request, ignore)


def stage_row(cycle: int) -> StageRow:
    return StageRow(
        stage=f"cycle-{cycle}", run_id="run", uri="u", parent_uri=None, start_step=20 * (cycle - 1),
        end_step=20 * cycle, cycle=cycle, tokens=None, seconds=1.0, before=Scores(), after=Scores(), rank=2,
        fingerprint=str(cycle), size_bytes=1,
    )  # fmt: skip


def run_data(records: list[dict[str, float]], cycles: int) -> RunData:
    from datetime import UTC, datetime

    return RunData(
        run_id="run", profile="p", method="relora", stages=tuple(stage_row(c + 1) for c in range(cycles)),
        train=train_curve(records), merges=(), evaluations=(), samples=(), spectra=(), spectra_between=None,
        settings={}, versions={}, dataset_id="", dataset_uri="", finished_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip


def record(step: int, change: float, a: float = 0.0) -> dict[str, float]:
    return {"kind": "train", "step": step, "relative_weight_change": change, "lora_A_update_norm": a}


def test_the_size_of_a_reset_is_the_largest_first_change_against_the_last_before_it():
    records = [record(1, 9.0), record(20, 0.5), record(21, 0.0), record(22, 2.0, 7.0), record(25, 1.0), record(40, 0.1)]
    (size,) = reset_sizes(run_data(records, cycles=2))
    assert (size.cycle, size.largest_change, size.change_before, size.largest_a_move) == (2, 2.0, 0.5, 7.0)
    assert size.ratio == 4.0


def test_runs_from_before_the_records_have_none():
    assert reset_sizes(run_data([{"kind": "train", "step": s} for s in (1, 20, 21, 40)], cycles=2)) == ()


def test_the_report_has_the_sizes_over_seeds_and_the_runs_without():
    planned = load_experiment("resets")
    sizes = reset_sizes(run_data([record(20, 0.5), record(22, 2.0, 7.0), record(42, 3.0), record(40, 1.0)], cycles=3))
    runs = [
        RunResult(arm="zero", seed=seed, run_id=f"zero-{seed}", outcome="trained", dataset_id="d", val_loss=1.0,
                  val_perplexity=3.0, resets=sizes)
        for seed in (0, 1)
    ]  # fmt: skip
    runs.append(RunResult(arm="random-9-independent", seed=0, run_id="r", outcome="diverged", message="NaN at step 5"))
    compared = compare_results(planned, runs)
    row = next(row for row in compared.arms if row.arm == "zero")
    assert (row.largest_first_change.mean, row.first_change_ratio.mean, row.largest_a_move.mean) == (3.0, 4.0, 7.0)
    html = render_comparison(compared, {})
    section = html.partition("First updates after a reset")[2]
    assert "3 ± 0" in section and "4 ± 0" in section and "diverged" in section
    assert "First updates after a reset" not in render_comparison(compare_results(planned, runs[-1:]), {})
    assert np.isfinite(json.loads(compared.model_dump_json())["arms"][1]["largest_first_change"]["mean"])
