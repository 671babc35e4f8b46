"""matmul_precision = 'auto': what is fast and inexact is refused, and a run keeps what it began with, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import ignore, stage_request, tiny_profile
from tiny_models import tiny_llama
from torch import nn

from relora_train.errors import TrainingError
from relora_train.method.wrap import apply_relora
from relora_train.training import end_of_cycle as merging
from relora_train.training import precision
from relora_train.training.files import read_training_state
from relora_train.training.precision import Product, choose_precision, keeps_accuracy, product_error, products_of
from relora_train.training.snapshot import read_snapshot_state
from relora_train.training.trainer import run_stage

CPU = torch.device("cpu")
PRODUCTS = {Product(96, 256, 200), Product(96, 200, 16)}
FILES = ("model.safetensors", "optimizer.safetensors", "metrics.jsonl")


@pytest.mark.parametrize("error", [3e-4, 2e-3, 1.2e-5, 1.3e-6], ids=["TF32", "bfloat16", "three bfloat16", "4.3 times"])
def test_what_rounds_more_than_float32_is_refused(monkeypatch: pytest.MonkeyPatch, error: float):
    for medium, chosen in ((error, "highest"), (6e-7, "medium")):
        errors = {"highest": 3e-7, "medium": medium}
        monkeypatch.setattr(precision, "product_error", lambda products, device, name, errors=errors: errors[name])
        assert choose_precision(PRODUCTS, CPU, recorded=None) == chosen


def test_an_inaccurate_base_excuses_nothing(monkeypatch: pytest.MonkeyPatch):
    """Were "highest" itself in TF32 by some override, four times its error would be no float32."""
    monkeypatch.setattr(precision, "product_error", lambda *_: 3e-4)
    assert choose_precision(PRODUCTS, CPU, recorded=None) == "highest"


def test_errors_are_those_of_the_products():
    assert 1e-8 < product_error(PRODUCTS, CPU, "highest") < 1e-6
    before = torch.get_float32_matmul_precision()
    state = torch.get_rng_state()
    assert keeps_accuracy(PRODUCTS, CPU, "highest")
    assert torch.get_float32_matmul_precision() == before and torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):  # stands for a device that multiplies float32 so
        assert 1e-3 < product_error(PRODUCTS, CPU, "highest") < 1e-2


def test_products_are_those_of_the_models_matrices():
    model = tiny_llama()
    config: Any = model.config
    d, ff, kv = config.hidden_size, config.intermediate_size, model.model.layers[0].self_attn.k_proj.out_features
    expected = {(d, config.vocab_size), (d, d), (d, kv), (d, ff), (ff, d)}
    assert products_of(model, rows=64) == {Product(64, *sides) for sides in expected}
    apply_relora(model, rank=3, alpha=3, dropout=0.0, target_modules=["q_proj"], seed=0)
    assert products_of(model, rows=64) == {Product(64, *sides) for sides in expected | {(d, 3), (3, d)}}
    assert not products_of(nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4)), rows=8)


def made_medium_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which "medium" is bfloat16: the real probe, with such an error for that precision."""
    real = product_error
    monkeypatch.setattr(
        precision,
        "product_error",
        lambda products, device, name: 2e-3 if name == "medium" else real(products, device, name),
    )


def test_a_recorded_choice_is_taken_over_and_given_up_where_it_is_inexact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for recorded in ("highest", "high", "medium"):
        exact = keeps_accuracy(PRODUCTS, CPU, recorded)
        assert choose_precision(PRODUCTS, CPU, recorded=recorded) == (recorded if exact else "highest")
    caplog.clear()
    made_medium_inexact(monkeypatch)
    assert choose_precision(PRODUCTS, CPU, recorded="medium") == "highest"
    assert "began with matmul precision 'medium'" in caplog.text


# --- a run


@pytest.fixture(autouse=True)
def restored_precision() -> Any:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


WIDE: dict[str, Any] = {  # wide enough that "medium" is another path on a CPU that has one
    "model": {"hidden_size": 256, "intermediate_size": 256},
    "schedule": {"warm_start_steps": 3, "cycles": 1, "cycle_length": 4, "warmup_steps": 1, "restart_warmup_steps": 1},
    "relora": {"dropout": 0.1},
}


def auto_profile(setting: str, **sections: Any) -> Any:
    return tiny_profile(**WIDE, precision={"matmul_precision": setting}, **sections)


def let_the_check_choose(monkeypatch: pytest.MonkeyPatch, chosen: str) -> list[str | None]:
    """Have every later check of a new run end with this choice; return what runs had recorded when they asked."""
    asked: list[str | None] = []

    def choose(products: object, device: object, *, recorded: str | None) -> str:
        asked.append(recorded)
        return recorded or chosen

    monkeypatch.setattr(precision, "choose_precision", choose)
    return asked


def trained(profile: Any, dataset: Path, directory: Path) -> tuple[Path, Path]:
    first, second = directory / "warm-start", directory / "cycle-1"
    run_stage(stage_request(profile, "warm-start", dataset, first), ignore)
    run_stage(stage_request(profile, "cycle-1", dataset, second, first), ignore)
    return first, second


@pytest.mark.parametrize("choice", ["highest", "medium"])
def test_auto_has_the_bits_of_the_setting_it_chose_and_chooses_once_a_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str
):
    if not keeps_accuracy([Product(256, 256, 256)], CPU, "medium"):
        pytest.skip("on this CPU 'medium' is no float32")
    asked = let_the_check_choose(monkeypatch, choice)
    auto = trained(auto_profile("auto"), dataset, tmp_path / "auto")
    assert asked == [None, choice]
    explicit = trained(auto_profile(choice), dataset, tmp_path / "explicit")
    for ours, theirs in zip(auto, explicit, strict=True):
        assert read_training_state(ours).matmul_precision == choice
        assert read_training_state(theirs).matmul_precision is None
        for name in FILES[:2]:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_resumed_stage_takes_the_choice_from_its_snapshot(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not keeps_accuracy([Product(256, 256, 256)], CPU, "medium"):
        pytest.skip("on this CPU 'medium' is no float32")
    let_the_check_choose(monkeypatch, "medium")
    profile = auto_profile("auto", snapshots={"every_steps": 2, "every_seconds": None})
    request = stage_request(profile, "warm-start", dataset, tmp_path / "whole")
    events: list[dict[str, Any]] = []
    kept = request.model_copy(update={"snapshots_directory": tmp_path / "snapshots"})
    run_stage(kept, lambda event, **fields: events.append({"event": event, **fields}))
    started = next(event for event in events if event["event"] == "stage_started")
    assert started["matmul"] == "medium"
    [snapshot] = (tmp_path / "snapshots").iterdir()
    assert read_snapshot_state(snapshot).matmul_precision == "medium"
    asked = let_the_check_choose(monkeypatch, "highest")
    resumed = request.model_copy(update={"output_directory": tmp_path / "resumed", "snapshot_directory": snapshot})
    run_stage(resumed, ignore)
    assert asked == ["medium"] and torch.get_float32_matmul_precision() == "medium"
    for name in FILES[:2]:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_in_bfloat16_there_is_nothing_to_choose(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = let_the_check_choose(monkeypatch, "medium")
    profile = tiny_profile(precision={"matmul_precision": "auto", "dtype": "bfloat16"})
    run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "out"), ignore)
    assert not asked and read_training_state(tmp_path / "out").matmul_precision == "highest"


def test_state_from_before_the_choice_reads_as_none(dataset: Path, tmp_path: Path):
    run_stage(stage_request(tiny_profile(), "warm-start", dataset, tmp_path / "out"), ignore)
    path = tmp_path / "out" / "training_state.json"
    older = {key: value for key, value in json.loads(path.read_text()).items() if key != "matmul_precision"}
    path.write_text(json.dumps(older))
    assert read_training_state(tmp_path / "out").matmul_precision is None


# --- the check of a merge


@pytest.mark.parametrize("inexact", [False, True])
def test_a_merge_may_change_the_output_by_what_the_products_really_round(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inexact: bool
):
    """By measurement, whatever the setting is called: 'medium' in float32 has float32's tolerance."""
    if inexact:
        made_medium_inexact(monkeypatch)
    elif not keeps_accuracy([Product(256, 256, 256)], CPU, "medium"):
        pytest.skip("on this CPU 'medium' is no float32")
    monkeypatch.setattr(merging, "relative_change", lambda before, after: 1e-3)
    profile = tiny_profile(precision={"matmul_precision": "medium"})
    run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "parent"), ignore)
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "out", tmp_path / "parent")
    if inexact:
        run_stage(request, ignore)
        assert (tmp_path / "out" / "manifest.json").is_file()
    else:
        with pytest.raises(TrainingError, match=r"by 0\.001 .* more than rounding can \(0\.0001\)"):
            run_stage(request, ignore)
