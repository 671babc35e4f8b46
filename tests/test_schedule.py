import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_train.method.schedule import cosine, jagged_cosine, learning_rate
from relora_train.method.stages import plan_stages
from relora_train.settings.profile import Profile

PAPER = {
    "total_steps": 15_000,
    "warmup_steps": 500,
    "restart_warmup_steps": 100,
    "cycle_length": 5_000,
    "min_lr_ratio": 0.1,
}
"""The 250M run of arXiv 2307.05695 after its warm start."""

SETTINGS = [
    PAPER,
    {"total_steps": 400, "warmup_steps": 20, "restart_warmup_steps": 10, "cycle_length": 100, "min_lr_ratio": 0.1},
    {"total_steps": 400, "warmup_steps": 0, "restart_warmup_steps": 0, "cycle_length": 100, "min_lr_ratio": 0.0},
    {"total_steps": 12, "warmup_steps": 4, "restart_warmup_steps": 3, "cycle_length": 4, "min_lr_ratio": 1.0},
    {"total_steps": 5, "warmup_steps": 5, "restart_warmup_steps": 4, "cycle_length": 5, "min_lr_ratio": 0.5},
    {"total_steps": 3, "warmup_steps": 0, "restart_warmup_steps": 0, "cycle_length": 1, "min_lr_ratio": 0.1},
]


@st.composite
def valid_settings(draw):
    cycle_length = draw(st.integers(1, 60))
    return {
        "cycle_length": cycle_length,
        "total_steps": cycle_length * draw(st.integers(1, 6)),
        "warmup_steps": draw(st.integers(0, cycle_length)),
        "restart_warmup_steps": draw(st.integers(0, cycle_length - 1)),
        "min_lr_ratio": draw(st.floats(0, 1)),
    }


def jagged(step, *, cycle_length, **setting):
    return jagged_cosine(step, cycle_start=step - step % cycle_length, **setting)


def official(t, *, total_steps, warmup_steps, restart_warmup_steps, cycle_length, min_lr_ratio):
    """The three cases of `cosine_restarts` in Guitaricet/relora."""
    m, C, W1, Wr = min_lr_ratio, cycle_length, warmup_steps, restart_warmup_steps

    def decayed(p):
        return m + (1 - m) * (0.5 * (1 + math.cos(math.pi * p)))

    if t < W1:
        return t / max(1, W1)
    if t >= C and t % C < Wr:
        return (t % C) / max(1, Wr) * decayed(((t // C) * C + Wr - W1) / max(1, total_steps - W1))
    return decayed((t - W1) / max(1, total_steps - W1))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"C{s['cycle_length']}-of-{s['total_steps']}")
def test_the_jagged_cosine_is_the_official_formula_at_every_step(setting):
    for step in range(setting["total_steps"]):
        # Same arithmetic in another order of products: two roundings of float64.
        assert jagged(step, **setting) == pytest.approx(official(step, **setting), rel=1e-15, abs=0)


@settings(deadline=None)  # a shared machine may pause in mid-example
@given(valid_settings())
def test_any_valid_setting_gives_the_official_formula_within_zero_and_one(setting):
    for step in range(setting["total_steps"]):
        factor = jagged(step, **setting)
        assert factor == pytest.approx(official(step, **setting), rel=1e-15, abs=0)
        assert 0 <= factor <= 1


def test_the_points_a_reader_of_the_paper_can_check_by_hand():
    def at(step):
        return jagged(step, **PAPER)

    middle = (15_000 + 500) // 2  # half-way through the decay: the mean of 1 and min_lr_ratio
    assert at(0) == 0
    assert at(250) == 0.5
    assert at(500) == 1
    assert at(middle) == pytest.approx(0.55, rel=1e-15)
    assert at(5_000) == 0
    assert at(5_050) == pytest.approx(at(5_100) / 2, rel=1e-15)
    assert 0.1 < at(14_999) < 0.1 + 1e-7


@settings(deadline=None)  # a shared machine may pause in mid-example
@given(valid_settings())
def test_a_climb_after_a_merge_is_linear_and_ends_on_the_cosine(setting):
    climb = setting["restart_warmup_steps"]
    smooth = {**setting, "restart_warmup_steps": 0}
    for restart in range(setting["cycle_length"], setting["total_steps"], setting["cycle_length"]):
        top = jagged(restart + climb, **setting)
        assert top == jagged(restart + climb, **smooth)
        for i in range(climb):
            assert jagged(restart + i, **setting) == pytest.approx(top * i / climb, rel=1e-14, abs=0)


def test_a_plain_cosine_warms_up_and_decays_to_its_minimum():
    setting = {"total_steps": 110, "warmup_steps": 10, "min_lr_ratio": 0.2}
    assert [cosine(step, **setting) for step in range(10)] == [i / 10 for i in range(10)]
    assert cosine(10, **setting) == 1
    assert cosine(60, **setting) == pytest.approx(0.6, rel=1e-15)  # the mean of 1 and 0.2
    assert cosine(110, **setting) == 0.2
    falling = [cosine(step, **setting) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_no_warm_up_begins_at_the_full_rate_and_nothing_but_warm_up_ends_there():
    assert cosine(0, total_steps=5, warmup_steps=0, min_lr_ratio=0.1) == 1
    assert cosine(5, total_steps=5, warmup_steps=5, min_lr_ratio=0.1) == 1


def test_the_warm_start_is_the_start_of_a_cosine_over_the_whole_run_and_the_cycles_have_one_of_their_own():
    schedule = {
        "warm_start_steps": 100, "cycles": 3, "cycle_length": 100, "warmup_steps": 20, "restart_warmup_steps": 10,
    }  # fmt: skip
    profile = Profile.model_validate({"schedule": schedule, "optimizer": {"learning_rate": 1e-3}})
    curve = {"warmup_steps": 20, "min_lr_ratio": 0.1}
    warm, *cycles = plan_stages(profile)
    for step in range(1, 101):
        assert learning_rate(profile, warm, step) == 5e-4 * cosine(step - 1, total_steps=400, **curve)
    phase = {**curve, "total_steps": 300, "restart_warmup_steps": 10, "cycle_length": 100}
    for stage in cycles:
        for step in range(stage.first_step, stage.end_step + 1):
            assert learning_rate(profile, stage, step) == 1e-3 * jagged(step - 101, **phase)
