import json
import re
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from schedules import schedules

from relora_train.errors import ConfigError
from relora_train.method.schedule import learning_rate
from relora_train.method.stages import fingerprint_settings, plan_stages, stage_fingerprint, until
from relora_train.settings.keys import differing_settings
from relora_train.settings.load import profile_directory
from relora_train.settings.profile import Profile, default_run_id

DATASET = "d" * 64

CHANGES = {
    "method": "lora",
    "seed": 1,
    "model.pretrained": "some/model",
    "model.revision": "v2",
    "model.hidden_size": 512,
    "model.intermediate_size": 512,
    "model.num_hidden_layers": 5,
    "model.num_attention_heads": 8,
    "model.num_key_value_heads": 2,
    "model.vocab_size": 8192,
    "model.max_position_embeddings": 2048,
    "model.initializer_range": 0.03,
    "model.rms_norm_eps": 1e-5,
    "model.rope_theta": 500_000.0,
    **dict.fromkeys(("model.tie_word_embeddings", "relora.rank_stabilized"), True),
    "batch.sequences": 64,
    "batch.sequence_length": 128,
    "batch.micro_sequences": 8,
    "batch.documents": "mask",
    "batch.too_long": "drop",
    "batch.target_length": 16,
    "schedule.warm_start_steps": 100,
    "schedule.cycles": 5,
    "schedule.cycle_length": 300,
    "schedule.warmup_steps": 30,
    "schedule.restart_warmup_steps": 20,
    "schedule.min_lr_ratio": 0.2,
    "schedule.jagged": False,
    "schedule.cycle_growth": 1.5,
    "schedule.horizon": 7,
    **dict.fromkeys(("relora.rank", "relora.alpha"), 16),
    "relora.dropout": 0.0,
    "relora.dropout_mask": "hash",
    "relora.target_modules": ("q_proj",),
    "relora.train": {"embeddings": False},
    "optimizer.learning_rate": 2e-3,
    "optimizer.warm_start_learning_rate": 3e-4,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.max_grad_norm": None,
    "optimizer.state": "8bit",
    **dict.fromkeys(("optimizer.kind", "optimizer.low_rank_state"), "factored"),
    "optimizer_reset.mode": "zero",
    "optimizer_reset.ratio": 0.9,
    **dict.fromkeys(("optimizer_reset.independent_masks", "optimizer_reset.restart_clock"), True),
    "precision.dtype": "bfloat16",
    "precision.matmul_precision": "medium",
    "precision.deterministic": False,
    "precision.frozen": "int8",
}
"""Settings that change what a ReLoRA run computes, each with another value than its default."""

THROUGH_THE_DATASET = {
    "tokenizer.path": "some/tokenizer",
    "tokenizer.revision": "v2",
    "tokenizer.train": True,
    "tokenizer.vocab_size": 2048,
    "tokenizer.eos_token": "</s>",
    "tokenizer.mask_token": "[MASK]",
    "tokenizer.training_bytes": 1_000_000,
    "data.source": "hub",
    "data.hub_id": "some/corpus",
    "data.hub_config": "en",
    "data.hub_split": "test",
    "data.hub_revision": "v2",
    **dict.fromkeys(("data.paths", "data.packages", "data.sources", "data.validation_paths"), ()),
    "data.text_field": "content",
    "data.instructions": None,  # these two are refused for the default source: tests/test_instructions.py
    "data.labels": None,
    "data.unreadable": "stop",  # 'skip' is refused for the default source: tests/test_left_out.py
    "data.max_documents": 10,
    "data.validation_fraction": 0.1,
    "data.shard_tokens": 4096,
    "data.bos": True,
}
"""Settings that change the dataset, whose id is part of every fingerprint."""

CHANGES_NOTHING = {
    "name": "other",
    "data.name": "other",
    "data.workers": 2,
    "data.engine": "tokenizers",
    "data.dask": "tcp://head:8786",
    "data.content_sha256": "e" * 64,
    "divergence.on_divergence": "lower_lr",
    "divergence.factor": 0.3,
    "divergence.max_retries": 1,
    **dict.fromkeys(("evaluation.sequences", "evaluation.final_sequences"), 64),
    "evaluation.batch_sequences": 8,
    "evaluation.sample_prompts": ("def ",),
    "evaluation.sample_tokens": 8,
    "logging.every_steps": 1,
    "snapshots.every_steps": 10,
    "snapshots.every_seconds": 60.0,
    "snapshots.keep": 3,
    "launch.device": "cpu",
    "launch.nproc_per_node": 4,
    "launch.nnodes": 2,
    "launch.rdzv_endpoint": "trainer-0:29400",
    "launch.sharding": "full",
    "launch.threads": 2,
    "launch.compile": True,
    "launch.recompute_elementwise": False,
    "launch.gradient_checkpointing": True,
    "retention.keep_last": 2,
    "retention.keep_every": 5,
    "tracking.to": ("trackio",),
    **dict.fromkeys(("tracking.project", "tracking.directory"), "other"),
}
"""Settings that change no weight beyond the order of sums."""

OF_ONE_KIND = {"precision.residual", "optimizer.in_backward"}
OF_ONE_KIND |= {f"optimizer.subspace_{key}" for key in ("rank", "steps", "scale")}
"""Settings that only bfloat16, two optimizers and full rank have: tests/test_rules_runs.py, test_early_updates.py."""

OF_ONE_OBJECTIVE = {"objective", "images.size", "images.channels", "images.classes", "images.patch_size"}
"""Settings that only another objective than the default knows: tests/test_objectives.py."""


def leaf_settings() -> set[str]:
    def leaves(model: type[BaseModel], prefix: str) -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            if not prefix and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found |= leaves(field.annotation, f"{prefix}{name}.")
            else:
                found.add(prefix + name)
        return found

    return leaves(Profile, "")


def profile_with(changes: dict) -> Profile:
    if "launch.nnodes" in changes:  # refused without
        changes = {"launch.rdzv_endpoint": CHANGES_NOTHING["launch.rdzv_endpoint"], **changes}
    if changes.get("tokenizer.train"):  # refused with
        changes = {key: value for key, value in changes.items() if key != "tokenizer.path"}
    if changes.get("launch.sharding") == "full":  # does not go with it
        changes = {key: value for key, value in changes.items() if key != "launch.compile"}
    settings: dict = {}
    for key, value in changes.items():
        section, _, field = key.rpartition(".")
        (settings.setdefault(section, {}) if section else settings)[field] = value
    return Profile.model_validate(settings)


def fingerprints(profile: Profile, dataset_id: str = DATASET) -> dict[str, str]:
    """Fingerprint of every stage of a run from its first step."""
    chain: dict[str, str] = {}
    parent = None
    for stage in plan_stages(profile):
        parent = chain[stage.name] = stage_fingerprint(fingerprint_settings(profile, stage, dataset_id), parent)
    return chain


def last_fingerprint(profile: Profile, dataset_id: str = DATASET) -> str:
    return list(fingerprints(profile, dataset_id).values())[-1]


def test_every_setting_is_classified():
    """A new setting must be put in one of the lists above, and in fingerprint_settings() if it changes a result."""
    classes = [set(CHANGES), set(THROUGH_THE_DATASET), set(CHANGES_NOTHING), OF_ONE_KIND, OF_ONE_OBJECTIVE]
    assert set.union(*classes) == leaf_settings()
    assert sum(map(len, classes)) == len(leaf_settings())


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_that_changes_the_result_changes_the_fingerprint(key):
    assert last_fingerprint(profile_with({key: CHANGES[key]})) != last_fingerprint(Profile())


@given(st.lists(st.sampled_from(sorted(CHANGES)), unique=True), st.lists(st.sampled_from(sorted(CHANGES)), unique=True))
def test_two_sets_of_changes_have_one_fingerprint_only_when_they_are_equal(ours, theirs):
    """No change hides another."""
    refused = [{"schedule.horizon", "schedule.cycle_growth"}]
    refused += [{"optimizer.state", f"optimizer.{key}"} for key in ("kind", "low_rank_state")]
    assume(not any(pair <= {*keys} for pair in refused for keys in (ours, theirs)))
    profiles = [profile_with({key: CHANGES[key] for key in keys if key != "method"}) for keys in (ours, theirs)]
    same = last_fingerprint(profiles[0]) == last_fingerprint(profiles[1])
    assert same == ({*ours} - {"method"} == {*theirs} - {"method"})


@given(st.lists(st.sampled_from(sorted({*CHANGES_NOTHING, *THROUGH_THE_DATASET})), unique=True))
def test_settings_that_change_no_weight_leave_every_fingerprint_as_it_is(keys):
    changes = {key: value for key, value in {**CHANGES_NOTHING, **THROUGH_THE_DATASET}.items() if key in keys}
    if changes.get("data.source") == "hub":
        changes |= {"data.hub_id": "some/corpus", "data.content_sha256": ""}
    if "launch.sharding" in changes:
        changes.pop("launch.compile", None)  # refused together
    assert fingerprints(profile_with(changes)) == fingerprints(Profile())


def test_another_dataset_changes_every_fingerprint():
    ours, theirs = fingerprints(Profile()), fingerprints(Profile(), "e" * 64)
    assert all(ours[name] != theirs[name] for name in ours)


@pytest.mark.parametrize(
    "key",
    sorted(
        {*CHANGES, *THROUGH_THE_DATASET}
        - {"data.paths", "data.sources", "data.validation_paths", "data.unreadable", "data.source", "tokenizer.train"}
        - {"data.instructions", "data.labels", "data.packages"}
    ),
)
def test_a_setting_that_changes_the_result_makes_another_run(key):
    assert default_run_id(profile_with({key: {**CHANGES, **THROUGH_THE_DATASET}[key]})) != default_run_id(Profile())


@pytest.mark.parametrize("key", sorted(set(CHANGES_NOTHING) - {"name"}))
def test_a_setting_that_changes_no_weight_meets_its_own_run_again(key):
    assert default_run_id(profile_with({key: CHANGES_NOTHING[key]})) == default_run_id(Profile())


LATER_ONLY = {
    "relora.rank": "cycle-1",
    "relora.dropout": "cycle-1",
    "relora.dropout_mask": "cycle-1",
    "relora.target_modules": "cycle-1",
    "relora.train": "cycle-1",
    "optimizer_reset.mode": "cycle-1",
    "precision.frozen": "cycle-1",
    "schedule.restart_warmup_steps": "cycle-2",
    "schedule.jagged": "cycle-2",
    "schedule.cycle_growth": "cycle-1",
}
"""Setting -> the first stage it can touch."""


@pytest.mark.parametrize(("key", "first"), LATER_ONLY.items())
def test_a_setting_of_later_stages_leaves_the_earlier_ones_alone(key, first):
    ours, theirs = fingerprints(Profile()), fingerprints(profile_with({key: CHANGES[key]}))
    names = list(ours)
    assert [name for name in names if ours[name] == theirs[name]] == names[: names.index(first)]


def test_the_learning_rate_of_the_cycles_leaves_a_warm_start_with_its_own_alone():
    ours = profile_with({"optimizer.warm_start_learning_rate": 5e-4, "optimizer.learning_rate": 1e-3})
    theirs = profile_with({"optimizer.warm_start_learning_rate": 5e-4, "optimizer.learning_rate": 2e-3})
    assert fingerprints(ours)["warm-start"] == fingerprints(theirs)["warm-start"]
    assert fingerprints(ours)["cycle-1"] != fingerprints(theirs)["cycle-1"]


def test_relora_and_lora_share_their_warm_start():
    assert fingerprints(Profile())["warm-start"] == fingerprints(Profile(method="lora"))["warm-start"]


@pytest.mark.parametrize("key", [key for key in CHANGES if key.startswith(("relora.", "optimizer_reset."))])
def test_full_rank_training_does_not_depend_on_the_low_rank_settings(key):
    changed = profile_with({"method": "full", key: CHANGES[key]})
    assert fingerprints(changed) == fingerprints(Profile(method="full"))


@given(st.text(), st.text())
def test_the_parents_fingerprint_changes_the_childs(ours, theirs):
    settings = fingerprint_settings(Profile(), plan_stages(Profile())[1], DATASET)
    same = stage_fingerprint(settings, ours) == stage_fingerprint(settings, theirs)
    assert same == (ours == theirs)
    assert stage_fingerprint(settings, None) != stage_fingerprint(settings, ours)


def test_settings_behind_a_fingerprint_survive_json():
    """They are stored in the manifest, and compared with those of a later run."""
    settings = fingerprint_settings(
        profile_with({"relora.target_modules": ("a", "b")}), plan_stages(Profile())[1], DATASET
    )
    assert differing_settings(settings, json.loads(json.dumps(settings))) == []


def test_differences_are_named_with_both_values():
    stage = plan_stages(Profile())[1]
    ours = fingerprint_settings(profile_with({"relora.rank": 16, "seed": 3}), stage, DATASET)
    theirs = fingerprint_settings(Profile(), stage, DATASET)
    assert differing_settings(ours, theirs) == ["relora.rank: 32 -> 16", "seed: 0 -> 3"]
    growing = fingerprint_settings(profile_with({"schedule.cycle_growth": 1.5}), stage, DATASET)
    assert differing_settings(growing, theirs) == ["schedule.cycle_growth: absent -> 1.5"]


SCHEDULES = schedules(most_cycles=12, longest_cycle=300)


@given(SCHEDULES, st.sampled_from(["full", "lora", "relora"]))
def test_stages_cover_every_step_once_and_in_order(schedule, method):
    profile = Profile.model_validate({"schedule": schedule, "method": method})
    stages = plan_stages(profile)
    assert stages[0].start_step == 0
    assert all(before.end_step == after.start_step for before, after in pairwise(stages))
    assert stages[-1].end_step == profile.schedule.total_steps
    assert all(stage.steps > 0 for stage in stages)
    assert len({stage.name for stage in stages}) == len(stages)


@given(SCHEDULES)
def test_every_relora_stage_after_the_warm_start_is_one_cycle(schedule):
    profile = Profile.model_validate({"schedule": schedule})
    cycles = [stage for stage in plan_stages(profile) if stage.kind == "relora"]
    assert [stage.cycle for stage in cycles] == list(range(1, schedule["cycles"] + 1))
    assert {stage.steps for stage in cycles} == {schedule["cycle_length"]}
    assert cycles[0].start_step == schedule["warm_start_steps"]


def described(profile: Profile) -> list[tuple]:
    return [(stage.name, stage.kind, stage.start_step, stage.end_step, stage.cycle) for stage in plan_stages(profile)]


SMALL = {"warm_start_steps": 100, "cycles": 2, "cycle_length": 50}


def test_stages_of_each_method():
    assert described(Profile.model_validate({"schedule": SMALL})) == [
        ("warm-start", "warm_start", 0, 100, 0),
        ("cycle-1", "relora", 100, 150, 1),
        ("cycle-2", "relora", 150, 200, 2),
    ]
    assert described(Profile.model_validate({"schedule": SMALL, "method": "lora"})) == [
        ("warm-start", "warm_start", 0, 100, 0),
        ("lora", "lora", 100, 200, 1),
    ]
    assert described(Profile.model_validate({"schedule": SMALL, "method": "full"})) == [
        ("full-1", "full", 0, 100, 0),
        ("full-2", "full", 100, 150, 0),
        ("full-3", "full", 150, 200, 0),
    ]


def test_cycles_and_full_rank_hand_on_their_optimizer_and_low_rank_is_what_a_merge_ends():
    traits = {
        stage.kind: (stage.keeps_optimizer, stage.low_rank)
        for method in ("relora", "lora", "full")
        for stage in plan_stages(Profile.model_validate({"schedule": SMALL, "method": method}))
    }
    assert traits == {
        "warm_start": (False, False), "relora": (True, True), "lora": (False, True), "full": (True, False),
    }  # fmt: skip


def test_a_run_can_stop_after_any_of_its_stages_and_no_other():
    stages = plan_stages(Profile.model_validate({"schedule": SMALL}))
    assert [stage.name for stage in until("cycle-1", stages)] == ["warm-start", "cycle-1"]
    assert until(None, stages) == stages
    with pytest.raises(ConfigError, match="no stage 'lora' to stop after; left to train are warm-start, cycle-1, cyc"):
        until("lora", stages)


@pytest.mark.parametrize(("method", "first"), [("relora", "cycle-1"), ("lora", "lora"), ("full", "full-1")])
def test_without_a_warm_start_the_first_stage_is_the_methods_own(method, first):
    profile = Profile.model_validate({"schedule": {**SMALL, "warm_start_steps": 0}, "method": method})
    assert plan_stages(profile)[0].name == first


def rates(profile: Profile) -> list[float]:
    return [
        learning_rate(profile, stage, step)
        for stage in plan_stages(profile)
        for step in range(stage.start_step + 1, stage.end_step + 1)
    ]


def restarts(profile: Profile) -> list[int]:
    """Updates, counted from 1, that run at a rate of zero."""
    return [step for step, rate in enumerate(rates(profile), start=1) if rate == 0]


def test_the_learning_rate_falls_to_zero_at_each_phase_and_after_each_merge_only():
    schedule = {**SMALL, "cycles": 3, "warmup_steps": 10, "restart_warmup_steps": 5}
    assert restarts(Profile.model_validate({"schedule": schedule})) == [1, 101, 151, 201]
    assert restarts(Profile.model_validate({"schedule": schedule, "method": "lora"})) == [1, 101]
    assert restarts(Profile.model_validate({"schedule": schedule, "method": "full"})) == [1]


def test_without_jags_the_cycles_follow_one_cosine_as_a_lora_does():
    schedule = {**SMALL, "cycles": 3, "warmup_steps": 10, "restart_warmup_steps": 5, "jagged": False}
    smooth = Profile.model_validate({"schedule": schedule})
    assert restarts(smooth) == [1, 101]
    assert rates(smooth) == rates(smooth.model_copy(update={"method": "lora"}))
    assert [stage.name for stage in plan_stages(smooth)] == ["warm-start", "cycle-1", "cycle-2", "cycle-3"]


def test_the_jagged_schedule_leaves_names_from_before_its_key_alone():
    """Names and fingerprints of runs that were made before schedule.jagged existed, with all defaults."""
    assert (default_run_id(Profile()), last_fingerprint(Profile())[:16]) == ("profile-b7ae16c4", "f063a5ff87fc8f08")


def test_the_phases_peak_at_their_own_learning_rates():
    profile = Profile.model_validate({"schedule": SMALL, "optimizer": {"learning_rate": 4e-3}})
    assert max(rates(profile)[:100]) == pytest.approx(2e-3)
    assert max(rates(profile)[100:]) == pytest.approx(4e-3)
    assert max(rates(profile.model_copy(update={"method": "full"}))) == pytest.approx(4e-3)


def test_the_readme_marks_what_each_setting_changes():
    section, marks = "", {}
    for line in (profile_directory() / "README.md").read_text().partition("## Every key")[2].splitlines():
        if heading := re.match(r"### `\[(\w+)\]`", line):
            section = f"{heading[1]}."
        elif row := re.match(r"\| `(\w+)` \|[^|]+\|([^|]*)\|", line):
            marks[section + row[1]] = row[2].strip()
    expected = (
        dict.fromkeys({*CHANGES, *OF_ONE_OBJECTIVE, *OF_ONE_KIND}, "")
        | dict.fromkeys(THROUGH_THE_DATASET, "◇")
        | dict.fromkeys(CHANGES_NOTHING, "○")
    )
    assert marks == expected


@pytest.mark.parametrize("jagged", [True, False])
@pytest.mark.parametrize("method", ["relora", "lora", "full"])
def test_a_horizon_keeps_the_curve_and_the_fingerprints_while_cycles_are_added(method: str, jagged: bool):
    """Six cycles on the curve of four: the first four as they were, then the rate at the curve's end."""
    shape = {"warm_start_steps": 30, "cycle_length": 40, "warmup_steps": 5, "restart_warmup_steps": 4, "jagged": jagged}
    four, six = (Profile.model_validate({"method": method, "schedule": {**shape, "cycles": n}}) for n in (4, 6))
    long = Profile.model_validate({"method": method, "schedule": {**shape, "cycles": 6, "horizon": 4}})
    short = Profile.model_validate({"method": method, "schedule": {**shape, "cycles": 4, "horizon": 6}})
    assert rates(long)[: len(rates(four))] == rates(four)
    added = rates(long)[len(rates(four)) :]
    assert len(added) == 80 and max(added) == pytest.approx(1e-4)  # min_lr_ratio of the peak
    climbs = [1e-4 * step / 4 for step in range(4)] if method == "relora" and jagged else [1e-4] * 4
    assert added == pytest.approx((climbs + [1e-4] * 36) * 2, abs=1e-9)
    assert rates(short) == rates(six)[: len(rates(four))]
    if method != "lora":  # which is one stage, and ends elsewhere
        assert list(fingerprints(long).items())[:5] == list(fingerprints(four).items())
        assert list(fingerprints(six).items())[:5] == list(fingerprints(short).items())
    assert not set(fingerprints(six).values()) & set(fingerprints(four).values())


def test_cycles_that_grow_take_no_horizon():
    with pytest.raises(ValidationError, match="horizon 5 counts cycles of one length"):
        Profile.model_validate({"schedule": {"horizon": 5, "cycle_growth": 1.5}})
