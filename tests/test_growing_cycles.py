"""Cycles that grow share the steps of the phase; their merges, rates and continuations follow their lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.errors import ConfigError
from relora_train.method.schedule import learning_rate
from relora_train.method.stages import fingerprint_settings, plan_stages, stages_after
from relora_train.settings.profile import Profile
from relora_train.settings.schedule import ScheduleConfig


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
