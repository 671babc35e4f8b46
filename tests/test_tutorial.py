"""The regression demo: what it claims, over seeds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from relora_train.errors import ConfigError
from relora_train.experiments.measured import TutorialSettings
from relora_train.experiments.tutorial import ARMS, TutorialResult, run_tutorial
from relora_train.experiments.tutorial_report import PAIRS, measured_tutorial, verdict


@pytest.fixture(scope="module")
def result() -> TutorialResult:
    return run_tutorial(range(200, 205))  # not the seeds that anything was chosen on


def test_lora_ends_at_the_bound_of_its_rank_and_relora_passes_it(result):
    """Eckart and Young: no update of rank 4 gets below best_low_rank, and LoRA comes within 5 % of it."""
    assert (result.final("lora") >= result.best_low_rank * (1 - 1e-5)).all()
    assert (result.final("lora") <= result.best_low_rank * 1.05).all()
    assert (result.final("relora") < 0.5 * result.best_low_rank).all()


def test_full_rank_and_relora_reach_the_least_squares_solution(result):
    """Full rank to float32 rounding, ReLoRA a little above it: the order of the three is the same for every seed."""
    assert (np.abs(result.final("full") - result.best) < 1e-6 * result.best).all()
    assert (result.final("full") < result.final("relora")).all()
    assert (result.final("relora") - result.best < 1e-3 * result.best).all()
    assert (result.final("relora") < result.final("lora")).all()


def test_all_arms_start_alike_and_part_at_the_first_merge(result):
    for arm in ARMS:
        np.testing.assert_array_equal(result.losses[arm][:, 0], result.losses["full"][:, 0])
    assert result.losses["lora"].shape == (5, result.settings.steps + 1)
    assert not np.array_equal(result.losses["relora"][:, :60], result.losses["lora"][:, :60])


def test_a_merge_leaves_the_loss_where_it_was(result):
    """The loss before update 51 is that of the merged weights; without its merge it would be that of update 50."""
    step = result.settings.cycle_length
    one = run_tutorial([200, 201], TutorialSettings(steps=step, restart_warmup_steps=5))
    longer = run_tutorial([200, 201], TutorialSettings(steps=2 * step, restart_warmup_steps=5))
    assert np.isfinite(one.final("relora")).all()
    jump = longer.losses["relora"][:, step + 1] - longer.losses["relora"][:, step]
    np.testing.assert_allclose(jump, 0, atol=1e-5)  # update 51 runs at learning rate zero


def test_with_enough_rank_lora_needs_no_restarts():
    """The same code with factors of full rank: the gap is the rank's, and not something else's."""
    wide = run_tutorial(range(200, 203), TutorialSettings(rank=5, alpha=5.0))
    np.testing.assert_allclose(wide.best_low_rank, wide.best)
    assert (wide.final("lora") < 1.01 * wide.best).all()


def test_the_same_seeds_give_the_same_numbers(result):
    again = run_tutorial([201, 203])
    for arm in ARMS:
        np.testing.assert_array_equal(again.losses[arm], result.losses[arm][[1, 3]])


def test_means_errors_and_paired_differences_are_those_of_the_losses(result):
    record = json.loads(json.dumps(measured_tutorial(result).numbers, allow_nan=False))
    for arm in ARMS:
        losses = result.final(arm)
        assert record["mean_final_loss"][arm]["mean"] == pytest.approx(losses.mean())
        assert record["mean_final_loss"][arm]["standard_error"] == pytest.approx(losses.std(ddof=1) / math.sqrt(5))
    for (arm, reference), shown in zip(PAIRS, record["paired_differences"], strict=True):
        gaps = result.final(arm) - result.final(reference)
        assert shown["mean"] == pytest.approx(gaps.mean())
        assert shown["standard_error"] == pytest.approx(gaps.std(ddof=1) / math.sqrt(5))
        assert result.difference(arm, reference).count == 5


def test_the_verdict_follows_the_numbers(result):
    swapped = TutorialResult(
        result.settings, result.seeds,
        {"full": result.losses["full"], "relora": result.losses["lora"], "lora": result.losses["relora"]},
        result.best, result.best_low_rank,
    )  # fmt: skip
    assert verdict(result).startswith("ReLoRA ends below LoRA")
    assert verdict(swapped).startswith("ReLoRA does not end below LoRA")


def test_one_seed_is_refused():
    with pytest.raises(ConfigError, match="standard error"):
        run_tutorial([1])
