"""What goes beyond the paper does what it says, leaves everything as it was when off, and touches low rank only."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from stage_runs import ignore, manifest_of, metrics_of, prepared, run_all, stage_request, tiny_profile
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.errors import ConfigError
from relora_train.method.optimizer import build_optimizer, parameter_groups, set_learning_rate
from relora_train.method.rank_allocation import allocate_ranks, ranks_from_warm_start
from relora_train.method.relora import apply_relora, lora_parameters, merge, relora_layers, target_names
from relora_train.method.stages import fingerprint_settings, plan_stages, stage_learning_rate, stages_after
from relora_train.reports.ranks.adapters import AdapterDirectory
from relora_train.settings.profile import Profile
from relora_train.settings.schedule import ScheduleConfig
from relora_train.training.files import read_training_state
from relora_train.training.trainer import run_stage


def wrapped_llama() -> torch.nn.Module:
    model = tiny_llama()
    apply_relora(model, rank=4, alpha=4, dropout=0.0, target_modules=None, seed=0)
    return model


# --- learning rates of A and B (LoRA+)


def test_every_group_has_its_own_share_of_the_learning_rate():
    model = wrapped_llama()
    optimizer = build_optimizer(
        model,
        learning_rate=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        low_rank_lr_ratio=2.0,
        low_rank_b_lr_ratio=8.0,
    )
    set_learning_rate(optimizer, 0.01)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        factor = name.rpartition(".")[2]
        assert rate == pytest.approx({"lora_A": 0.02, "lora_B": 0.16}.get(factor, 0.01)), name


def test_without_ratios_the_groups_are_the_papers():
    groups = parameter_groups(wrapped_llama(), weight_decay=0.1)
    assert [(group["weight_decay"], group["lr_ratio"]) for group in groups] == [(0.1, 1.0), (0.0, 1.0)]


def test_the_first_update_of_b_is_the_ratio_times_as_large(warm_start: Path, dataset: Path, tmp_path: Path):
    """Adam's first step has the size of its rate, whatever the gradient: so the ratio shows as it is."""
    moved = {}
    for ratio in (1.0, 4.0):
        training = prepared(warm_start, dataset, tmp_path, optimizer={"low_rank_b_lr_ratio": ratio})
        training.update(7)  # at rate zero: it only fills the moments
        training.optimizer.zero_grad()
        training.update(8)
        moved[ratio] = {name: p.detach() for name, p in training.model.named_parameters() if p.requires_grad}
    for name, plain in moved[1.0].items():
        factor = 4.0 if name.endswith("lora_B") else 1.0
        torch.testing.assert_close(moved[4.0][name], factor * plain, rtol=1e-5, atol=1e-8)


# --- merges in bfloat16


@pytest.mark.parametrize(("rms", "lost"), [(6e-6, 0.5), (6e-4, 0.0)])
def test_a_merge_in_bfloat16_rounds_the_sum_and_loses_small_updates(rms: float, lost: float):
    model = wrapped_llama()
    with torch.no_grad():
        for _, factor in lora_parameters(model):
            factor.normal_(generator=torch.Generator().manual_seed(1)).mul_((rms / 2) ** 0.5)
    expected = {
        name: layer.weight + layer.scaling * layer.lora_B @ layer.lora_A for name, layer in relora_layers(model)
    }
    before = {name: layer.weight.detach().clone() for name, layer in relora_layers(model)}
    merge(model, keep_in=torch.bfloat16)
    for name, layer in relora_layers(model):
        torch.testing.assert_close(layer.weight, expected[name].bfloat16().float(), rtol=0.008, atol=0)
        assert torch.equal(layer.weight, layer.weight.bfloat16().float())
        kept = (layer.weight != before[name].bfloat16().float()).float().mean()
        assert (kept < 1 - lost) if lost else (kept > 0.8), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_commits_the_rounded_weights_of_wrapped_layers_and_no_others(
    warm_start: Path, dataset: Path, tmp_path: Path, dtype: str
):
    profile = tiny_profile(relora={"merge_dtype": "bfloat16"}, precision={"dtype": dtype})
    run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out", warm_start), ignore)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    rounded = {name for name, weight in weights.items() if torch.equal(weight, weight.bfloat16().float())}
    assert {name for name in rounded if "layernorm" not in name} == {name for name in weights if "_proj" in name}
    assert 1e-4 < manifest_of(tmp_path / "out")["merge_report"]["max_relative_output_change"] < 0.1
    assert metrics_of(tmp_path / "out", "merge")


# --- growing cycles


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
            stage_learning_rate(p, stage, step)
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


# --- ranks by layer


def test_ranks_follow_the_weights_within_the_budget():
    shapes = {"a": (10, 10), "b": (10, 10), "c": (10, 10)}
    assert allocate_ranks({"a": 1.0, "b": 1.0, "c": 1.0}, shapes, rank=3) == {"a": 3, "b": 3, "c": 3}
    assert allocate_ranks({"a": 1.0, "b": 2.0, "c": 3.0}, shapes, rank=4) == {"a": 2, "b": 4, "c": 6}
    assert allocate_ranks({"a": 0.0, "b": 1.0, "c": 1.0}, shapes, rank=3) == {"a": 1, "b": 4, "c": 4}
    assert allocate_ranks({"a": 1.0, "b": 1.0, "c": 99.0}, shapes, rank=4) == {"a": 1, "b": 1, "c": 10}


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(2, 60), st.integers(2, 60), st.just(0.0) | st.floats(1, 50)), min_size=1, max_size=8
    ),
    st.data(),
)
def test_an_allocation_is_bounded_and_leaves_no_room_for_another_direction(layers: list[Any], data: st.DataObject):
    shapes = {str(i): (out, inputs) for i, (out, inputs, _) in enumerate(layers)}
    weights = {str(i): weight for i, (_, _, weight) in enumerate(layers)}
    rank = data.draw(st.integers(1, min(min(shape) for shape in shapes.values())))
    ranks = allocate_ranks(weights, shapes, rank=rank)
    assert list(ranks) == list(shapes)
    assert all(1 <= ranks[name] <= min(shapes[name]) for name in shapes)
    spent, budget = (sum(r[name] * sum(shapes[name]) for name in shapes) for r in (ranks, dict.fromkeys(shapes, rank)))
    assert spent <= budget
    if any(weights.values()) and any(ranks[name] < min(shapes[name]) for name in shapes if weights[name]):
        assert budget - spent <= max(map(sum, shapes.values())) * len(shapes)


def test_a_warm_start_that_changed_few_directions_of_a_layer_gives_it_few():
    """Updates of known rank: 1 in every layer but the MLP's first, where it is 8."""
    before, after = tiny_llama(seed=0), tiny_llama(seed=0)
    names = target_names(after, None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:
            weight, directions = after.get_submodule(name).weight, 8 if "gate_proj" in name else 1
            left = torch.linalg.qr(torch.randn(weight.shape[0], directions, generator=generator)).Q
            right = torch.linalg.qr(torch.randn(weight.shape[1], directions, generator=generator)).Q
            weight += left @ right.T
    ranks = ranks_from_warm_start(after, before, names, rank=2)
    wide = {ranks[name] for name in names if "gate_proj" in name}
    narrow = {ranks[name] for name in names if "gate_proj" not in name}
    assert narrow <= {1, 2} and min(wide) >= 4
    with pytest.raises(ConfigError, match="there was no warm start"):
        ranks_from_warm_start(before, tiny_llama(seed=0), names, rank=2)


@pytest.fixture(scope="module")
def by_layer(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    profile = tiny_profile(relora={"rank_allocation": "warm-start-spectrum", "rank": 6})
    return run_all(profile, dataset, tmp_path_factory.mktemp("by-layer"))


def test_ranks_are_recorded_by_the_first_cycle_and_the_same_in_all_that_follow(by_layer: dict[str, Path]):
    first, second = (manifest_of(by_layer[name])["merge_report"]["layer_ranks"] for name in ("cycle-1", "cycle-2"))
    assert first == second == read_training_state(by_layer["cycle-2"]).layer_ranks
    assert len(first) == 14 and len(set(first.values())) > 1
    adapter = load_file(by_layer["cycle-2"] / "adapter" / "adapter_model.safetensors")
    shapes = {
        n.removesuffix(".lora_A.weight").removeprefix("base_model.model."): len(A)
        for n, A in adapter.items()
        if "lora_A" in n
    }
    assert shapes == first
    spent = sum(tensor.numel() for tensor in adapter.values())
    even = sum(
        6 * tensor.numel() // first[n.removeprefix("base_model.model.").rpartition(".lora_")[0]]
        for n, tensor in adapter.items()
    )
    assert 0.9 * even < spent <= even


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_with_ranks_by_layer_is_read_by_peft_and_by_the_rank_analysis(by_layer: dict[str, Path]):
    parent = AutoModelForCausalLM.from_pretrained(by_layer["cycle-1"])
    before = {name: weight.clone() for name, weight in parent.state_dict().items()}
    adapted = PeftModel.from_pretrained(parent, str(by_layer["cycle-2"] / "adapter")).merge_and_unload().state_dict()
    merged = load_file(by_layer["cycle-2"] / "model.safetensors")
    ours = AdapterDirectory(by_layer["cycle-2"])
    for name in ours.names:
        torch.testing.assert_close(adapted[name], merged[name], rtol=1e-4, atol=1e-6)
        factors = ours.factors(name)
        change = torch.from_numpy(factors.B @ factors.A).float()
        torch.testing.assert_close(before[name] + change, merged[name], rtol=1e-4, atol=1e-6)


def test_ranks_by_layer_are_refused_where_there_is_no_spectrum(
    dataset: Path, tmp_path: Path, by_layer: dict[str, Path]
):
    chosen = {"rank_allocation": "warm-start-spectrum"}
    with pytest.raises(ValueError, match=r"needs schedule\.warm_start_steps above 0"):
        tiny_profile(relora=chosen, schedule={"warm_start_steps": 0})
    with pytest.raises(ValueError, match=r"nothing to share out at relora\.rank 1"):
        tiny_profile(relora=chosen | {"rank": 1})
    with pytest.raises(ValueError, match="looks at whole weights"):
        tiny_profile(relora=chosen, launch={"sharding": "full"})
    uniform = tmp_path / "uniform"
    run_stage(stage_request(tiny_profile(), "cycle-1", dataset, uniform, by_layer["warm-start"]), ignore)
    assert read_training_state(uniform).layer_ranks == {}
    request = stage_request(tiny_profile(relora=chosen), "cycle-2", dataset, tmp_path / "out", uniform)
    with pytest.raises(ConfigError, match="cycle-2 does not follow one"):
        run_stage(request, ignore)
