"""A merge leaves the function as it was and is exact in its masters; what it cannot do exactly it refuses."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import ignore, prepared
from test_relora import TINY_MODELS, adamw, fill_updates, one_layer, wrap
from tiny_models import backward, logits, relative_error
from torch import nn

from relora_train.errors import DivergedError, ModelError
from relora_train.method.layer import lora_parameters, relora_layers
from relora_train.method.merge import merge, merge_and_reinit
from relora_train.method.reset import reset_optimizer_state
from relora_train.training import end_of_cycle
from relora_train.training.end_of_cycle import finish_cycle, stage_adapter
from relora_train.training.optimizer import optimizer_state_by_name
from relora_train.training.step import StageTraining


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@TINY_MODELS
def test_a_merge_leaves_the_function_unchanged(build, dtype, tolerance):
    """Up to rounding: W is rounded once more, and two layers of sums carry it on."""
    model = build().to(dtype)
    unmerged_base = logits(model)
    wrap(model, dropout=0.1)
    fill_updates(model)
    expected = logits(model)
    merge_and_reinit(model, cycle=1, seed=0)
    assert relative_error(logits(model), expected) < tolerance
    assert relative_error(unmerged_base, expected) > 0.01  # there was something to lose


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_merge_of_one_layer_leaves_its_output_unchanged(dtype, tolerance):
    model = one_layer(dtype=dtype)
    x = torch.randn(50, 20, dtype=dtype)
    expected = model(x)
    merge_and_reinit(model, cycle=1, seed=0)
    assert relative_error(model(x), expected) < tolerance
    assert model[0].lora_B.count_nonzero() == 0


@TINY_MODELS
def test_gradients_are_alive_in_the_first_cycle_and_after_a_merge(build):
    model = build()
    wrap(model)
    optimizer = adamw(model)
    for cycle in (1, 2):
        backward(model)
        assert all(layer.lora_B.grad.abs().max() > 0 for _, layer in relora_layers(model))
        optimizer.step()  # B leaves zero, so A's gradient comes alive
        backward(model)
        assert all(p.grad.abs().max() > 0 for _, p in lora_parameters(model))
        merge_and_reinit(model, cycle=cycle, seed=0)


def test_cycles_of_real_training_add_up_to_a_higher_rank_than_one_cycle_has():
    rank, cycles = 2, 3
    torch.manual_seed(0)
    target = torch.randn(24, 20, dtype=torch.float64)
    x = torch.randn(256, 20, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(20, 24, dtype=torch.float64))
    start = model[0].weight.detach().clone()
    wrap(model, rank=rank, target_modules=["0"])
    ranks = []
    for cycle in range(1, cycles + 1):
        optimizer = adamw(model)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - x @ target.T).square().mean().backward()
            optimizer.step()
        merge_and_reinit(model, cycle=cycle, seed=0)
        # float64 rounding of W (about 1e-16) is far below, any trained direction (about 1e-2) far above.
        singular_values = torch.linalg.svdvals(model[0].weight.detach() - start)
        ranks.append(int((singular_values > 1e-10 * singular_values[0]).sum()))
    assert ranks == [rank, 2 * rank, 3 * rank]


def test_the_report_agrees_with_the_full_matrices():
    model = one_layer(rank=6)
    layer = model[0]
    update, weight = (layer.scaling * layer.lora_B @ layer.lora_A).detach(), layer.weight.detach().clone()
    singular_values = torch.linalg.svdvals(update)
    share = singular_values[:6] / singular_values.sum()
    report = merge_and_reinit(model, cycle=1, seed=0)
    assert list(report) == ["0"]
    close = {"rel": 1e-10}  # float64 through a QR
    assert report["0"].update_norm == pytest.approx(update.norm().item(), **close)
    assert report["0"].weight_norm == pytest.approx(weight.norm().item(), **close)
    assert report["0"].relative_update_norm == pytest.approx((update.norm() / weight.norm()).item(), **close)
    assert report["0"].effective_rank == pytest.approx(math.exp(-(share * share.log()).sum()), **close)


def test_the_effective_rank_counts_equal_directions():
    model = nn.Sequential(nn.Linear(20, 24, dtype=torch.float64))
    wrap(model, rank=5, target_modules=["0"])
    assert merge(model)["0"].effective_rank == 0
    with torch.no_grad():
        model[0].lora_A.copy_(torch.eye(5, 20))
        model[0].lora_B.copy_(torch.eye(24, 5))
        model[0].lora_B[:, 3:] = 0
    assert merge(model)["0"].effective_rank == pytest.approx(3, rel=1e-12)


def test_a_merge_into_a_zero_weight_has_a_finite_report():
    model = one_layer()
    nn.init.zeros_(model[0].weight)
    assert merge(model)["0"].relative_update_norm == 1
    nn.init.zeros_(model[0].weight)
    assert merge(model)["0"].relative_update_norm == 0


def test_merging_twice_adds_the_update_once():
    model = one_layer()
    merge(model)
    weight = model[0].weight.detach().clone()
    merge(model)
    assert torch.equal(model[0].weight, weight)


class PrecisionOfEachMerge(dict):
    """Masters that note the matmul precision in force when a merged weight is handed back."""

    noted = ()

    def __setitem__(self, name, weight):
        self.noted += (torch.get_float32_matmul_precision(),)
        super().__setitem__(name, weight)


def test_a_merge_runs_at_the_highest_matmul_precision_and_puts_the_chosen_one_back():
    """Lowered precision is TF32 on a GPU and bfloat16 on some processors; on others it changes nothing to compare."""
    model = one_layer(dtype=torch.float32)
    masters = PrecisionOfEachMerge(masters_of(model))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        merge(model, masters=masters)
        assert masters.noted == ("highest",)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# --- masters


def masters_of(model):
    return {f"{name}.weight": layer.weight.detach().clone() for name, layer in relora_layers(model)}


def test_a_bfloat16_weight_becomes_its_float32_master_rounded_once():
    exact, rounded = one_layer(dtype=torch.float32), one_layer(dtype=torch.float32)
    masters = masters_of(rounded)
    rounded[0].weight.data = rounded[0].weight.data.bfloat16()
    for cycle in range(1, 6):
        merge_and_reinit(exact, cycle=cycle, seed=0)
        merge_and_reinit(rounded, cycle=cycle, seed=0, masters=masters)
        for model in (exact, rounded):
            fill_updates(model, seed=cycle)
    assert torch.equal(masters["0.weight"], exact[0].weight)
    assert torch.equal(rounded[0].weight, exact[0].weight.bfloat16())
    assert rounded[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_weight_without_a_master_is_refused_and_nothing_changes(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 24, dtype=dtype))
    wrap(model, target_modules=["0", "1"])
    fill_updates(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"weight of 1 is torch\..*masters"):
        merge_and_reinit(model, cycle=1, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("masters", "message"),
    [
        ({}, r"No master weight is called 0\.weight"),
        ({"0.weight": torch.zeros(24, 20, dtype=torch.bfloat16)}, r"master weight of 0 is torch\.bfloat16"),
        ({"0.weight": torch.zeros(20, 24)}, r"\(24, 20\) and its master \(20, 24\)"),
    ],
)
def test_masters_that_do_not_fit_are_refused(masters, message):
    with pytest.raises(ModelError, match=message):
        merge(one_layer(dtype=torch.float32), masters=masters)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_never_merged(bad):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    wrap(model, target_modules=["0", "1"])
    fill_updates(model)
    model[1].lora_B.data[0, 0] = bad
    before = [layer.weight.detach().clone() for layer in model]
    with pytest.raises(DivergedError, match="update of 1 is not finite"):
        merge(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, before, strict=True))


SEED = 3
RESET = {"mode": "random", "ratio": 0.5, "independent_masks": True}


@pytest.fixture
def trained(warm_start: Path, dataset: Path, tmp_path: Path) -> Any:
    """Make a first cycle after two updates of it: the same bits at every call."""

    def make() -> StageTraining:
        training = prepared(warm_start, dataset, tmp_path, seed=SEED, optimizer_reset=RESET)
        for step in (7, 8):
            training.optimizer.zero_grad()
            training.update(step)
        return training

    return make


def test_a_cycle_ends_in_the_merge_and_the_reset_of_its_profile_and_says_so(trained: Any):
    training, twin = trained(), trained()
    metrics: list[dict[str, Any]] = [{"lora_A_grad_norm": a, "lora_B_grad_norm": 4.0 - a} for a in (1.0, 3.0)]
    events: list[tuple[str, dict[str, Any]]] = []
    adapter, config = stage_adapter(training)
    report = finish_cycle(
        training, [*metrics, {"kind": "evaluation"}], lambda name, **fields: events.append((name, fields))
    )

    layers = merge_and_reinit(twin.model, cycle=1, seed=SEED, masters=twin.masters)
    reset = reset_optimizer_state(twin.optimizer, lora_parameters(twin.model), **RESET, seed=SEED, cycle=1)
    expected = twin.model.state_dict()
    for name, weight in training.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    state, expected_state = (optimizer_state_by_name(each.optimizer, each.model) for each in (training, twin))
    for name, moments in expected_state.items():
        assert all(torch.equal(state[name][key], moment) for key, moment in moments.items()), name
    assert training.model.training, "the next cycle has its dropout"

    update, weight = (
        sum(getattr(each, name) ** 2 for each in layers.values()) for name in ("update_norm", "weight_norm")
    )
    assert report["relative_update_norm"] == pytest.approx((update / weight) ** 0.5)
    assert report["effective_rank"] == pytest.approx(sum(each.effective_rank for each in layers.values()) / len(layers))
    assert 0 < report["max_relative_output_change"] < 1e-5
    assert report["optimizer_state_zeroed"] == reset.share_zeroed > 0
    assert (report["first_lora_A_grad_norm"], report["first_lora_B_grad_norm"]) == (3.0, 3.0), "the largest of each"
    assert report["layers"] == {
        f"{name}.weight": {
            "update_norm": each.update_norm, "weight_norm": each.weight_norm,
            "relative_update_norm": each.relative_update_norm, "effective_rank": each.effective_rank,
        }
        for name, each in layers.items()
    }  # fmt: skip
    summary = {key: value for key, value in report.items() if key != "layers"}
    assert events == [("merge", {"stage": "cycle-1", "step": 14, **summary})] and summary["cycle"] == 1
    assert set(adapter) == {f"base_model.model.{name}.weight" for name, _ in lora_parameters(twin.model)}
    parent = training.request.parent
    assert parent is not None and parent.fingerprint[:12] in config["base_model_name_or_path"]
    assert any(factor.count_nonzero() for name, factor in adapter.items() if "lora_B" in name)


def test_a_model_whose_output_is_not_finite_is_not_merged(trained: Any):
    training = trained()
    with torch.no_grad():
        training.model.model.norm.weight.fill_(float("nan"))
    before = {name: weight.clone() for name, weight in training.model.state_dict().items()}
    with pytest.raises(DivergedError, match="not finite at step 14, the last of stage cycle-1"):
        finish_cycle(training, [], ignore)
    for name, weight in training.model.state_dict().items():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num()), name


def test_a_merge_is_probed_by_all_held_out_examples_where_there_are_few(trained: Any, monkeypatch: pytest.MonkeyPatch):
    training = trained()
    monkeypatch.setattr(end_of_cycle, "_PROBE_SEQUENCES", training.val_data.blocks + 1)
    assert 0 < finish_cycle(training, [], ignore)["max_relative_output_change"] < 1e-5
