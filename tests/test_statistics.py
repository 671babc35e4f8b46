"""Means, errors and paired differences against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora_train.reports.statistics import Estimate, estimate, paired_difference
from relora_train.reports.text import estimate_text, signed_estimate_text

finite = st.floats(-1e6, 1e6)


def test_mean_and_error_of_known_values():
    """1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3, error √(14/3/4) = 1.0801."""
    known = estimate([1.0, 2.0, 3.0, 6.0])
    assert known is not None
    assert (known.mean, known.count) == (3.0, 4)
    assert known.standard_error == pytest.approx(math.sqrt(14 / 12))


def test_one_value_has_no_error_and_equal_ones_have_0_and_none_has_no_mean():
    assert estimate([4.2]) == Estimate(mean=4.2, standard_error=None, count=1)
    assert estimate([]) is None
    assert estimate([0.25] * 3) == Estimate(mean=0.25, standard_error=0.0, count=3)
    assert not Estimate(mean=1e9, standard_error=None, count=1).differs_from_zero()


def test_a_paired_difference_forgets_what_the_seeds_have_in_common():
    """Three seeds far apart, each arm better by about .011: differences −.0119, −.0107, −.0111 as in our prototype.

    Mean −.033700/3 = −.0112333; deviations −.0006667, .0005333, .0001333; their squares sum to 7.4667e-7; over 2 and
    over 3, the root is 3.528e-4.
    """
    relora = {0: 1.4069, 1: 1.3884, 2: 1.3999}
    warm = {0: 1.4188, 1: 1.3991, 2: 1.4110}
    difference = paired_difference(relora, warm)
    assert difference is not None
    assert difference.mean == pytest.approx(-0.0112333, abs=1e-7)
    assert difference.standard_error == pytest.approx(3.528e-4, abs=1e-7)
    assert difference.differs_from_zero()
    alone = [estimate(list(values.values())) for values in (relora, warm)]
    assert all(one is not None and one.standard_error > 10 * difference.standard_error for one in alone)


def test_only_seeds_that_both_have_are_paired():
    assert paired_difference({0: 1.0, 1: 5.0, 2: 3.0}, {1: 4.0, 2: 1.0, 7: 9.0}) == estimate([1.0, 2.0])
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_difference({3: 1.0}, {3: 0.5}) == Estimate(mean=0.5, standard_error=None, count=1)


def test_two_errors_from_zero_is_the_line():
    assert Estimate(mean=-2.1, standard_error=1.0, count=3).differs_from_zero()
    assert not Estimate(mean=1.9, standard_error=1.0, count=3).differs_from_zero()
    assert not Estimate(mean=9.0, standard_error=1.0, count=2).differs_from_zero(), "two values tell no error"
    assert Estimate(mean=0.1, standard_error=0.0, count=3).differs_from_zero()


@given(st.lists(finite, min_size=2, max_size=9), finite)
def test_a_shift_moves_the_mean_and_leaves_the_error(values: list[float], shift: float):
    ours, theirs = estimate(values), estimate([value + shift for value in values])
    assert ours is not None and theirs is not None
    assert theirs.mean == pytest.approx(ours.mean + shift, abs=1e-6)
    assert theirs.standard_error == pytest.approx(ours.standard_error, abs=1e-4)


@pytest.mark.parametrize(
    ("mean", "error", "text", "signed"),
    [
        (22.4834, 0.0312, "22.483 ± 0.031", "+22.483 ± 0.031"),
        (-0.011233, 0.000353, "−0.01123 ± 0.00035", "−0.01123 ± 0.00035"),
        (10_523.2, 412.0, "10,523 ± 412", "+10,523 ± 412"),
        (1.39, 0.0, "1.39 ± 0", "+1.39 ± 0"),
        (0.0, 0.0, "0 ± 0", "0 ± 0"),
        (102.45, None, "102.5", "+102.5"),
        (0.5, 0.996, "0.5 ± 1.0", "+0.5 ± 1.0"),
        (12_345_678.0, None, "12,345,678", "+12,345,678"),
    ],
)
def test_a_mean_is_written_to_the_second_digit_of_its_error(mean: float, error: float | None, text: str, signed: str):
    shown = Estimate(mean=mean, standard_error=error, count=1 if error is None else 3)
    assert (estimate_text(shown), signed_estimate_text(shown)) == (text, signed)


def test_what_is_missing_is_a_dash():
    assert (estimate_text(None), signed_estimate_text(None)) == ("–", "–")
