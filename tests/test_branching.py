"""Any checkpoint of any run can be continued with any schedule: cycles are counted in merges, not in steps."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedules import schedules
from stage_runs import ignore, manifest_of, metrics_of, run_all, stage_request, tiny_profile

from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.errors import ConfigError
from relora_train.method.schedule import learning_rate
from relora_train.method.stages import Stage, fingerprint_settings, plan_stages, stage_fingerprint, stages_after
from relora_train.settings.profile import Profile
from relora_train.training.trainer import run_stage

DATASET = "d" * 64
SMALL = {"warm_start_steps": 100, "cycles": 3, "cycle_length": 50, "warmup_steps": 10, "restart_warmup_steps": 5}

SCHEDULES = schedules(most_cycles=8, longest_cycle=200)


def profile_of(method: str = "relora", /, **schedule: Any) -> Profile:
    return Profile.model_validate({"method": method, "schedule": {**SMALL, **schedule}})


def end_of(profile: Profile, stage: Stage, fingerprint: str = "f" * 64, **changes: Any) -> CheckpointManifest:
    """The manifest that a stage would leave."""
    return CheckpointManifest(
        files=(), attempt="a", run_id="run", profile="p", stage=stage.name, step=stage.end_step, cycle=stage.cycle,
        tokens_seen=0, fingerprint=fingerprint, fingerprint_settings=fingerprint_settings(profile, stage, DATASET),
        parent=None, dataset_id=DATASET, dataset_uri="memory://x/datasets/d", **changes,
    )  # fmt: skip


def described(stages: tuple[Stage, ...]) -> list[tuple[Any, ...]]:
    return [(stage.name, stage.start_step, stage.end_step, stage.cycle) for stage in stages]


def rates(profile: Profile, stage: Stage) -> list[float]:
    return [learning_rate(profile, stage, step) for step in range(stage.start_step + 1, stage.end_step + 1)]


@given(SCHEDULES, st.sampled_from(["full", "lora", "relora"]), st.data())
def test_the_same_settings_continue_exactly(schedule: dict[str, int], method: str, data: st.DataObject):
    """The rest of the plan, stage for stage, and so with the same fingerprints."""
    profile = Profile.model_validate({"schedule": schedule, "method": method})
    stages = plan_stages(profile)
    index = data.draw(st.integers(0, len(stages) - 1))
    assert stages_after(profile, end_of(profile, stages[index])) == stages[index + 1 :]


@given(SCHEDULES, SCHEDULES, st.data())
def test_after_any_checkpoint_the_cycles_that_are_missing_follow_without_a_gap(
    ours: dict[str, int], theirs: dict[str, int], data: st.DataObject
):
    before, now = (Profile.model_validate({"schedule": schedule}) for schedule in (theirs, ours))
    parent = end_of(before, data.draw(st.sampled_from(plan_stages(before))))
    stages = stages_after(now, parent)
    assert [stage.cycle for stage in stages] == list(range(parent.cycle + 1, ours["cycles"] + 1))
    bounds = [parent.step, *(stage.end_step for stage in stages)]
    assert [(stage.start_step, stage.end_step) for stage in stages] == list(itertools.pairwise(bounds))
    assert {stage.steps for stage in stages} <= {ours["cycle_length"]}
    for index, stage in enumerate(stages):  # a branch is continued as any run is
        assert stages_after(now, end_of(now, stage)) == stages[index + 1 :]


def test_another_cycle_length_starts_at_the_checkpoint_whatever_its_step():
    parent = end_of(profile_of(), plan_stages(profile_of())[2])  # cycle-2, step 200
    assert described(stages_after(profile_of(cycle_length=80, cycles=4), parent)) == [
        ("cycle-3", 200, 280, 3),
        ("cycle-4", 280, 360, 4),
    ]


def test_nothing_is_left_of_a_finished_run_and_of_one_that_did_more_cycles():
    last = end_of(profile_of(), plan_stages(profile_of())[-1])
    assert stages_after(profile_of(), last) == stages_after(profile_of(cycles=2), last) == ()


# --- the learning rate ---


def cosine_at(progress: float, *, ratio: float = 0.1) -> float:
    return ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def test_an_extended_run_goes_on_along_the_longer_cosine():
    """The closed form with N = 6 cycles for steps after the third merge: t counts from the end of the warm start."""
    longer = profile_of(cycles=6)
    stages = stages_after(longer, end_of(profile_of(), plan_stages(profile_of())[-1]))
    peak, total, warmup, climb = longer.optimizer.learning_rate, 300, 10, 5
    for stage in stages:
        expected = []
        for step in range(stage.start_step, stage.end_step):
            t = step - 100
            in_cycle = t % 50
            if in_cycle < climb:
                top = cosine_at((t - in_cycle + climb - warmup) / (total - warmup))
                expected.append(peak * top * in_cycle / climb)
            else:
                expected.append(peak * cosine_at((t - warmup) / (total - warmup)))
        assert rates(longer, stage) == pytest.approx(expected, rel=1e-12)  # one rounding apart
    assert described(stages) == [("cycle-4", 250, 300, 4), ("cycle-5", 300, 350, 5), ("cycle-6", 350, 400, 6)]


def test_the_first_added_cycle_climbs_above_where_the_shorter_run_ended_and_the_last_ends_at_the_floor():
    shorter, longer = profile_of(), profile_of(cycles=6)
    added = stages_after(longer, end_of(shorter, plan_stages(shorter)[-1]))
    assert rates(longer, added[0])[0] == 0
    assert max(rates(longer, added[0])) > 4 * rates(shorter, plan_stages(shorter)[-1])[-1]
    floor = longer.optimizer.learning_rate * longer.schedule.min_lr_ratio
    assert floor < rates(longer, added[-1])[-1] < 1.01 * floor


@given(SCHEDULES, st.integers(0, 8), st.integers(0, 10_000))
def test_a_cycle_runs_at_the_same_rates_wherever_it_starts(schedule: dict[str, int], merges: int, step: int):
    """A branch at an odd step has the rates of the same cycle of a plain run with these settings."""
    profile = Profile.model_validate({"schedule": schedule})
    parent = end_of(profile, Stage(f"cycle-{merges}", "relora", 0, step, merges, phase_step=0))
    plain = {stage.name: stage for stage in plan_stages(profile)}
    for stage in stages_after(profile, parent):
        assert rates(profile, stage) == rates(profile, plain[stage.name])


# --- fingerprints ---


def test_a_branch_on_the_same_curve_at_the_same_step_has_the_fingerprint_of_the_plain_run():
    """From a warm start of 100 steps, a profile that would have warmed up for 70 trains what one with 100 trains."""
    parent = end_of(profile_of(), plan_stages(profile_of())[0])
    ours, theirs = (profile_of(warm_start_steps=steps) for steps in (70, 100))
    for mine, yours in zip(stages_after(ours, parent), stages_after(theirs, parent), strict=True):
        assert rates(ours, mine) == rates(theirs, yours)
        assert fingerprint_settings(ours, mine, DATASET) == fingerprint_settings(theirs, yours, DATASET)


@given(SCHEDULES, SCHEDULES, st.integers(0, 4), st.integers(0, 500))
def test_two_schedules_share_a_fingerprint_only_where_they_share_every_rate(
    ours: dict[str, int], theirs: dict[str, int], merges: int, step: int
):
    def next_cycle(schedule: dict[str, int]) -> tuple[str, list[float]] | None:
        profile = Profile.model_validate({"schedule": schedule})
        stages = stages_after(profile, end_of(profile, Stage("x", "relora", 0, step, merges, phase_step=0)))
        if not stages:
            return None
        settings = fingerprint_settings(profile, stages[0], DATASET)
        return stage_fingerprint(settings, "parent"), rates(profile, stages[0])

    mine, yours = next_cycle(ours), next_cycle(theirs)
    if mine is not None and yours is not None and mine[0] == yours[0]:
        assert mine[1] == yours[1]


# --- methods ---


def test_a_full_rank_checkpoint_counts_as_the_warm_start():
    full = profile_of("full")
    parent = end_of(full, plan_stages(full)[1])  # step 150
    assert described(stages_after(profile_of(), parent))[0] == ("cycle-1", 150, 200, 1)
    assert described(stages_after(profile_of("lora"), parent)) == [("lora", 150, 300, 1)]


def test_full_rank_goes_on_along_its_one_cosine_from_any_checkpoint():
    full = profile_of("full")
    parent = end_of(profile_of(cycle_length=30), plan_stages(profile_of(cycle_length=30))[1])  # cycle-1, step 130
    stages = stages_after(full, parent)
    assert described(stages) == [("full-2", 130, 150, 0), ("full-3", 150, 200, 0), ("full-4", 200, 250, 0)]
    plain = [rate for stage in plan_stages(full) for rate in rates(full, stage)]
    assert [rate for stage in stages for rate in rates(full, stage)] == plain[130:]
    beyond = end_of(full, Stage("full-9", "full", 250, 300, 0, phase_step=250))
    assert stages_after(full, beyond) == ()


def test_a_merged_lora_counts_as_one_cycle_and_is_never_merged_twice():
    lora = profile_of("lora")
    parent = end_of(lora, plan_stages(lora)[-1])
    assert stages_after(lora, parent) == stages_after(profile_of("lora", cycles=9), parent) == ()
    assert described(stages_after(profile_of(), parent))[0] == ("cycle-2", 250, 300, 2)


def test_a_lora_from_a_checkpoint_with_merged_cycles_is_refused_with_the_way_out():
    parent = end_of(profile_of(), plan_stages(profile_of())[2])
    with pytest.raises(ConfigError, match=r"cycle-2 of run 'run' has 2 merged cycles.*run@warm-start"):
        stages_after(profile_of("lora"), parent)


def test_another_model_than_the_checkpoints_is_refused_by_name():
    parent = end_of(profile_of(), plan_stages(profile_of())[0])
    other = Profile.model_validate({"model": {"hidden_size": 512}})
    with pytest.raises(ConfigError, match=r"another model.*\n  - model\.hidden_size: 256 -> 512"):
        stages_after(other, parent)


# --- trained ---


@pytest.fixture(scope="module")
def line(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished tiny run: warm start to step 6, cycles to 14 and 22."""
    return run_all(tiny_profile(), dataset, tmp_path_factory.mktemp("run"))


def continue_from(profile: Profile, parent: Path, dataset: Path, output: Path) -> Path:
    """Train what follows a checkpoint, one stage; its directory."""
    manifest = CheckpointManifest.model_validate(manifest_of(parent))
    stage = stages_after(profile, manifest)[0]
    run_stage(stage_request(profile, stage, dataset, output, parent), ignore)
    return output


BRANCHES = [
    pytest.param({"schedule": {"cycles": 3}}, "cycle-2", (22, 30, 3), id="one more cycle"),
    pytest.param({"schedule": {"cycle_length": 5}}, "cycle-1", (14, 19, 2), id="shorter cycles"),
    pytest.param({"schedule": {"warm_start_steps": 9}}, "warm-start", (6, 14, 1), id="another warm start"),
    pytest.param({"relora": {"rank": 2}}, "cycle-1", (14, 22, 2), id="another rank"),
    pytest.param({"relora": {"target_modules": ("q_proj",)}}, "cycle-1", (14, 22, 2), id="other layers"),
    pytest.param({"method": "full"}, "cycle-1", (14, 22, 0), id="full rank after a cycle"),
    pytest.param({"optimizer": {"learning_rate": 5e-3}, "seed": 3}, "cycle-1", (14, 22, 2), id="rate and seed"),
]


@pytest.mark.parametrize(("changes", "parent", "expected"), BRANCHES)
def test_a_branch_trains_from_any_checkpoint(
    changes: dict[str, Any], parent: str, expected: tuple[int, int, int], line: dict[str, Path], dataset: Path,
    tmp_path: Path,
):  # fmt: skip
    profile = tiny_profile(**changes)
    made = manifest_of(continue_from(profile, line[parent], dataset, tmp_path / "out"))
    start, end, cycle = expected
    assert (made["parent"]["step"], made["step"], made["cycle"]) == (start, end, cycle)
    assert made["tokens_seen"] == end * profile.batch.tokens
    scores = made["evaluation"]
    assert scores["val_loss"] < scores["val_loss_before"]
    assert scores["val_loss_before"] == manifest_of(line[parent])["evaluation"]["val_loss"]
    logged = metrics_of(tmp_path / "out")
    stage = stages_after(profile, CheckpointManifest.model_validate(manifest_of(line[parent])))[0]
    assert [record["learning_rate"] for record in logged] == [
        learning_rate(profile, stage, record["step"]) for record in logged
    ]
