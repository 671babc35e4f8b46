"""The end of a cycle is one merge and one reset with the profile's own values, reported as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import ignore, prepared

from relora_train.errors import DivergedError
from relora_train.method.layer import lora_parameters
from relora_train.method.merge import merge_and_reinit
from relora_train.method.reset import reset_optimizer_state
from relora_train.training import end_of_cycle
from relora_train.training.end_of_cycle import finish_cycle, stage_adapter
from relora_train.training.optimizer import optimizer_state_by_name
from relora_train.training.step import StageTraining

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
