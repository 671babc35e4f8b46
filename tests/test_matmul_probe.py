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
from relora_train.method.relora import apply_relora
from relora_train.training import end_of_cycle as merging
from relora_train.training import matmul_probe
from relora_train.training.files import read_training_state
from relora_train.training.matmul_probe import (
    PRECISIONS,
    Measured,
    Product,
    fastest_accurate,
    keeps_accuracy,
    measure_precisions,
    product_error,
    products_of,
    settle,
)
from relora_train.training.snapshot import read_snapshot_state
from relora_train.training.trainer import run_stage

CPU = torch.device("cpu")
PRODUCTS = {Product(96, 256, 200): 2, Product(96, 200, 16): 1}
FILES = ("model.safetensors", "optimizer.safetensors", "metrics.jsonl")


def found(**seconds_and_errors: tuple[float | None, float]) -> Any:
    return {name: Measured(*values) for name, values in seconds_and_errors.items()}


def test_the_fastest_of_float32s_accuracy_is_taken():
    slow = (1.0, 3e-7)
    assert fastest_accurate(found(highest=slow, high=(None, 3e-7), medium=(0.5, 6e-7))) == "medium"
    assert fastest_accurate(found(highest=slow, high=(0.4, 5e-7), medium=(0.5, 6e-7))) == "high"
    assert fastest_accurate(found(highest=slow, high=(None, 3e-7), medium=(0.95, 6e-7))) == "highest"  # noise
    assert fastest_accurate(found(highest=(None, 3e-7), high=(None, 3e-7), medium=(None, 3e-7))) == "highest"


@pytest.mark.parametrize("error", [3e-4, 2e-3, 1.2e-5, 1.3e-6], ids=["TF32", "bfloat16", "three bfloat16", "4.3 times"])
def test_what_rounds_more_than_float32_is_refused_however_fast(error: float):
    assert fastest_accurate(found(highest=(1.0, 3e-7), high=(0.1, error), medium=(0.01, error))) == "highest"


def test_an_inaccurate_base_excuses_nothing():
    """Were "highest" itself in TF32 by some override, four times its error would be no float32."""
    assert fastest_accurate(found(highest=(1.0, 3e-4), high=(0.1, 4e-4), medium=(0.1, 4e-4))) == "highest"


def test_errors_are_those_of_the_products():
    assert 1e-8 < product_error(PRODUCTS, CPU, "highest") < 1e-6
    before = torch.get_float32_matmul_precision()
    state = torch.get_rng_state()
    measured = measure_precisions(PRODUCTS, CPU)
    assert tuple(measured) == PRECISIONS
    assert torch.get_float32_matmul_precision() == before and torch.equal(torch.get_rng_state(), state)
    for precision, values in measured.items():
        assert values.error == product_error(PRODUCTS, CPU, precision)
        assert (values.seconds is None) or values.seconds > 0
    with torch.autocast("cpu", torch.bfloat16):  # stands for a device that multiplies float32 so
        assert 1e-3 < product_error(PRODUCTS, CPU, "highest") < 1e-2


def test_products_are_those_of_the_models_matrices():
    model = tiny_llama()
    config: Any = model.config
    d, ff, kv = config.hidden_size, config.intermediate_size, model.model.layers[0].self_attn.k_proj.out_features
    blocks = config.num_hidden_layers
    expected = {Product(64, d, config.vocab_size): 1}
    for product, count in (
        (Product(64, d, d), 2), (Product(64, d, kv), 2), (Product(64, d, ff), 2), (Product(64, ff, d), 1),
    ):  # fmt: skip
        expected[product] = expected.get(product, 0) + count * blocks
    assert products_of(model, rows=64) == expected
    apply_relora(model, rank=3, alpha=3, dropout=0.0, target_modules=["q_proj"], seed=0)
    assert products_of(model, rows=64) == expected | {Product(64, d, 3): blocks, Product(64, 3, d): blocks}
    assert not products_of(nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4)), rows=8)


def made_medium_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which "medium" is bfloat16: the real probe, with such an error for that precision."""
    real = product_error
    monkeypatch.setattr(
        matmul_probe,
        "product_error",
        lambda products, device, precision: 2e-3 if precision == "medium" else real(products, device, precision),
    )


def test_a_recorded_choice_is_taken_over_without_a_clock_and_given_up_where_it_is_inexact(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(matmul_probe, "_seconds_of", lambda *a: pytest.fail("it looked at the clock"))
    for precision in PRECISIONS:
        assert settle(PRODUCTS, CPU, recorded=precision).precision == (
            precision if keeps_accuracy(PRODUCTS, CPU, precision) else "highest"
        )
    made_medium_inexact(monkeypatch)
    choice = settle(PRODUCTS, CPU, recorded="medium")
    assert choice.precision == "highest" and "began with 'medium'" in choice.reason


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


def auto_profile(precision: str, **sections: Any) -> Any:
    return tiny_profile(**WIDE, precision={"matmul_precision": precision}, **sections)


def let_the_probe_choose(monkeypatch: pytest.MonkeyPatch, precision: str) -> list[int]:
    """Have every later measurement end with this choice; how often one was made."""
    asked: list[int] = []
    measured = {p: Measured(0.1 if p == precision else 1.0, 3e-7) for p in PRECISIONS if p in ("highest", precision)}
    monkeypatch.setattr(matmul_probe, "measure_precisions", lambda *a: asked.append(1) or measured)
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
    if not keeps_accuracy({Product(256, 256, 256): 1}, CPU, "medium"):
        pytest.skip("on this CPU 'medium' is no float32")
    asked = let_the_probe_choose(monkeypatch, choice)
    auto = trained(auto_profile("auto"), dataset, tmp_path / "auto")
    assert len(asked) == 1
    explicit = trained(auto_profile(choice), dataset, tmp_path / "explicit")
    for ours, theirs in zip(auto, explicit, strict=True):
        assert read_training_state(ours).matmul_precision == choice
        assert read_training_state(theirs).matmul_precision is None
        for name in FILES[:2]:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_resumed_stage_takes_the_choice_from_its_snapshot_and_another_clock_changes_no_bit(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not keeps_accuracy({Product(256, 256, 256): 1}, CPU, "medium"):
        pytest.skip("on this CPU 'medium' is no float32")
    let_the_probe_choose(monkeypatch, "medium")
    profile = auto_profile("auto", snapshots={"every_steps": 2, "every_seconds": None})
    request = stage_request(profile, "warm-start", dataset, tmp_path / "whole")
    events: list[dict[str, Any]] = []
    kept = request.model_copy(update={"snapshots_directory": tmp_path / "snapshots"})
    run_stage(kept, lambda event, **fields: events.append({"event": event, **fields}))
    started = next(event for event in events if event["event"] == "stage_started")
    assert started["matmul"].startswith("medium (measured: 10 times as fast as 'highest'")
    [snapshot] = (tmp_path / "snapshots").iterdir()
    assert read_snapshot_state(snapshot).matmul_precision == "medium"
    asked = let_the_probe_choose(monkeypatch, "highest")
    resumed = request.model_copy(update={"output_directory": tmp_path / "resumed", "snapshot_directory": snapshot})
    run_stage(resumed, ignore)
    assert not asked and torch.get_float32_matmul_precision() == "medium"
    for name in FILES[:2]:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_in_bfloat16_there_is_nothing_to_choose(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = let_the_probe_choose(monkeypatch, "medium")
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
    elif not keeps_accuracy({Product(256, 256, 256): 1}, CPU, "medium"):
        pytest.skip("on this CPU 'medium' is no float32")
    monkeypatch.setattr(merging, "_relative_change", lambda before, after: 1e-3)
    profile = tiny_profile(precision={"matmul_precision": "medium"})
    run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "parent"), ignore)
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "out", tmp_path / "parent")
    if inexact:
        run_stage(request, ignore)
        assert (tmp_path / "out" / "manifest.json").is_file()
    else:
        with pytest.raises(TrainingError, match=r"by 0\.001 .* more than rounding can \(0\.0001\)"):
            run_stage(request, ignore)
