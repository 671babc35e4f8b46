"""The regression demo: what it claims, over seeds."""

import math
from dataclasses import replace

import numpy as np
import pytest

from relora_train.experiments.config import TutorialSettings
from relora_train.experiments.tutorial import ARMS, TutorialResult, measured_tutorial, run_tutorial

SETTINGS = TutorialSettings()


@pytest.fixture(scope="module")
def result() -> TutorialResult:
    return run_tutorial(range(200, 205), SETTINGS)  # not the seeds that anything was chosen on


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
    assert result.losses["lora"].shape == (5, SETTINGS.steps + 1)
    assert not np.array_equal(result.losses["relora"][:, :60], result.losses["lora"][:, :60])


def test_a_merge_leaves_the_loss_where_it_was():
    """The loss before update 51 is that of the merged weights; without its merge it would be that of update 50."""
    step = SETTINGS.cycle_length
    assert np.isfinite(run_tutorial([200], TutorialSettings(steps=step)).final("relora")).all()
    longer = run_tutorial([200, 201], TutorialSettings(steps=2 * step))
    jump = longer.losses["relora"][:, step + 1] - longer.losses["relora"][:, step]
    np.testing.assert_allclose(jump, 0, atol=1e-5)  # update 51 runs at learning rate zero


def test_with_enough_rank_lora_needs_no_restarts():
    """The same code with factors of full rank: the gap is the rank's, and not something else's."""
    wide = run_tutorial(range(200, 203), TutorialSettings(rank=5, alpha=5.0))
    np.testing.assert_allclose(wide.best_low_rank, wide.best)
    assert (wide.final("lora") < 1.01 * wide.best).all()


def test_the_same_seeds_give_the_same_numbers(result):
    again = run_tutorial([201, 203], SETTINGS)
    for arm in ARMS:
        np.testing.assert_array_equal(again.losses[arm], result.losses[arm][[1, 3]])


@pytest.mark.parametrize("arm", ["relora", "lora"])
def test_differences_are_paired_by_seed_and_the_numbers_are_all_final_losses(result, arm):
    gaps, shown = result.final(arm) - result.final("full"), result.difference(arm, "full")
    assert (shown.mean, shown.count) == (pytest.approx(gaps.mean()), 5)
    assert shown.standard_error == pytest.approx(gaps.std(ddof=1) / math.sqrt(5))
    assert measured_tutorial(result, SETTINGS).numbers["final_loss"][arm] == result.final(arm).tolist()


def test_the_headline_follows_the_numbers(result):
    losses = result.losses
    swapped = replace(result, losses={"full": losses["full"], "relora": losses["lora"], "lora": losses["relora"]})
    assert measured_tutorial(result, SETTINGS).headline.startswith("ReLoRA ends below LoRA")
    assert measured_tutorial(swapped, SETTINGS).headline.startswith("ReLoRA does not end below LoRA")
