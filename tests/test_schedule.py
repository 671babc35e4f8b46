import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.errors import ConfigError
from relora_train.method.schedule import cosine, jagged_cosine, learning_rate
from relora_train.method.stages import fingerprint_settings, plan_stages, stages_after
from relora_train.settings.method import ScheduleConfig
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


def growing(**schedule: Any) -> Profile:
    settings = {"warm_start_steps": 100, "cycles": 4, "cycle_length": 150, "cycle_growth": 2.0, **schedule}
    return Profile.model_validate({"schedule": settings})


def test_every_cycle_is_longer_by_the_factor_and_all_keep_their_steps():
    stages = plan_stages(growing())
    assert [(stage.name, stage.start_step, stage.end_step) for stage in stages] == [
        ("warm-start", 0, 100),
        ("cycle-1", 100, 140),
        ("cycle-2", 140, 220),
        ("cycle-3", 220, 380),
        ("cycle-4", 380, 700),
    ]
    assert growing().schedule.total_steps == growing(cycle_growth=1.0).schedule.total_steps == 700


@given(st.floats(0.5, 3.0), st.integers(1, 8), st.integers(60, 400))
def test_bounds_rise_to_the_phase_and_follow_the_factor_up_to_rounding(growth: float, cycles: int, length: int):
    settings = {"cycles": cycles, "cycle_length": length, "warmup_steps": 0, "restart_warmup_steps": 0}
    try:
        schedule = ScheduleConfig(cycle_growth=growth, **settings)
    except ValueError as error:
        assert "each needs 2 at least" in str(error)
        return
    bounds = schedule.cycle_bounds
    lengths = [end - start for start, end in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(lengths)) == (0, cycles * length, cycles)
    exact = [growth**k * cycles * length / sum(growth**j for j in range(cycles)) for k in range(cycles)]
    assert max(abs(ours - theirs) for ours, theirs in zip(lengths, exact, strict=True)) <= 1


def test_the_rate_restarts_at_the_grown_merges_and_lies_on_the_same_cosine():
    grown, even = growing(), growing(cycle_growth=1.0)
    rates, cosine = (
        [
            learning_rate(p, stage, step)
            for stage in plan_stages(p)
            for step in range(stage.first_step, stage.end_step + 1)
        ]
        for p in (grown, even.model_copy(update={"schedule": even.schedule.model_copy(update={"jagged": False})}))
    )
    assert [step for step, rate in enumerate(rates, start=1) if rate == 0] == [1, 101, 141, 221, 381]
    climbs = {start + i for start in (140, 220, 380) for i in range(1, 11)}
    for step, (rate, smooth) in enumerate(zip(rates, cosine, strict=True), start=1):
        assert rate < smooth if step in climbs else rate == smooth


def merged(profile: Profile, cycle: int, run_id: str = "grown") -> CheckpointManifest:
    stage = next(stage for stage in plan_stages(profile) if stage.cycle == cycle)
    settings = fingerprint_settings(profile, stage, "d" * 64)
    return CheckpointManifest(
        files=(), attempt="a" * 16, versions={}, run_id=run_id, profile="p", stage=stage.name, step=stage.end_step,
        cycle=cycle, tokens_seen=0, fingerprint="f" * 64, fingerprint_settings=settings, parent=None,
        dataset_id="d" * 64, dataset_uri="u", stage_seconds=1.0,
    )  # fmt: skip


def test_a_run_with_growing_cycles_goes_on_as_it_is_and_takes_no_more_cycles():
    parent = merged(growing(), cycle=2)
    assert stages_after(growing(), parent) == plan_stages(growing())[3:]
    assert stages_after(growing(), merged(growing(), cycle=4)) == ()
    with pytest.raises(ConfigError, match=r"cycle-2 of run 'grown' ended after 120 steps .*none can be added later"):
        stages_after(growing(cycles=5), parent)
    further = stages_after(growing(cycles=6, cycle_growth=1.0), parent)
    assert [(stage.name, stage.steps) for stage in further] == [(f"cycle-{k}", 150) for k in (3, 4, 5, 6)]
    from_a_warm_start = stages_after(growing(cycles=5), merged(growing(), cycle=0))
    assert from_a_warm_start == plan_stages(growing(cycles=5))[1:]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cycle_growth": 8.0}, "cycles of 1, 8, 66, 525 steps; each needs 2"),
        ({"cycle_growth": 3.0, "restart_warmup_steps": 15}, "restart_warmup_steps 15 must be below each"),
        ({"warmup_steps": 41}, "warmup_steps 41 must not exceed the first"),
    ],
)
def test_a_growth_that_leaves_a_cycle_too_short_is_refused_with_the_lengths(settings: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        growing(**settings)


def test_full_rank_has_its_checkpoints_where_the_cycles_end():
    profile = growing().model_copy(update={"method": "full"})
    assert [stage.end_step for stage in plan_stages(profile)] == [100, 140, 220, 380, 700]
