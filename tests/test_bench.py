"""`relora bench` compares steps that do the same work: all arms learn, and its numbers are those it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.text import Text

from relora_train.cli.app import main
from relora_train.cli.bench import about_this_machine, bench_view, records_of
from relora_train.errors import TrainerCrashedError
from relora_train.experiments.benchmark import arms
from relora_train.experiments.benchmark.arms import build_arm
from relora_train.experiments.benchmark.measure import ArmResult, measure, share_of_flop_bound, speed_ratio
from relora_train.experiments.benchmark.request import ARMS, SHAPES, Arm, ArmRequest, Shape
from relora_train.method.contraction import REFERENCE, LayerShape, candidates, flops_per_token

TINY = Shape(
    hidden_size=32, intermediate_size=88, layers=2, heads=2, vocab_size=256, rank=4, sequences=4, sequence_length=32
)


@pytest.fixture(scope="module")
def results() -> dict[str, ArmResult]:
    return measure({arm: ArmRequest(arm=arm, shape=TINY, threads=1) for arm in ARMS}, rounds=2, steps=8)


def test_every_arm_trains_the_same_model(results: dict[str, ArmResult]):
    assert list(results) == list(ARMS)
    for arm, result in results.items():
        assert len(result.seconds) == 2 and min(result.seconds) > 0, arm
        assert 2.5 < result.loss < 5.4, (arm, result.loss)  # it began at log 256 = 5.55
    sizes = {arm: result.memory["weights"] for arm, result in results.items()}
    assert sizes["full"] == sizes["ours-full"]
    assert sizes["paper"] == sizes["ours"] == sizes["peft"] > sizes["full"]
    assert results["ours"].memory["optimizer"] == pytest.approx(results["paper"].memory["optimizer"], rel=0.01)


def test_flops_are_of_the_matrices(results: dict[str, ArmResult]):
    weights = TINY.layers * (4 * 32**2 + 3 * 32 * 88)
    other = 6 * 32 * 256 + 12 * TINY.layers * 32 * 32
    assert results["full"].flops_per_token == 6 * weights + other
    assert 4 * weights + other < results["paper"].flops_per_token < results["full"].flops_per_token
    for result in results.values():
        assert result.utilisation == pytest.approx(
            result.tokens_per_second * result.flops_per_token / result.matmul_flops
        )


def test_a_ratio_is_taken_round_by_round(results: dict[str, ArmResult]):
    ours, full = results["ours"], results["full"]
    ratio = speed_ratio(ours, full)
    each = sorted(b / a for a, b in zip(ours.seconds, full.seconds, strict=True))
    assert (ratio.lowest, ratio.highest) == (each[0], each[-1])
    assert speed_ratio(full, full).median == 1


def timed(arm: Arm, seconds: tuple[float, ...], flops: float) -> ArmResult:
    memory = {"weights": 100, "optimizer": 20, "gradients": 10, "above_weights": 80}
    request = ArmRequest(arm=arm, shape=TINY)
    return ArmResult(request, "cpu", 1, seconds, 1.0, flops, 1e9, memory, {}, "highest")


def test_the_share_of_the_flop_bound_and_the_cost_of_dropout_are_of_rounds():
    full, ours = timed("ours-full", (1.2, 2.4, 1.2), 120.0), timed("ours", (1.0, 2.0, 1.1), 100.0)
    none, same = timed("ours", (0.8, 1.6, 0.88), 90.0), timed("ours", (0.9, 1.8, 0.99), 100.0)
    assert share_of_flop_bound(ours, full).median == pytest.approx(1.0)  # 1.2 times as fast with 1.2 times fewer FLOPs
    assert share_of_flop_bound(ours, full).lowest == pytest.approx(1.2 / 1.1 / 1.2)
    record = records_of({"ours-full": full, "ours": ours, "ours p=0": none, "ours p=0 split": same})
    assert record["arms"]["ours p=0"]["flop_bound"] == pytest.approx(120 / 90)
    cost = {part: ratio["median"] for part, ratio in record["dropout_cost"].items()}
    assert cost == pytest.approx({"total": 0.25, "order": 0.125, "masks": 1 / 9})
    assert record["memory_over_paper"] == {}


def test_memory_is_told_beside_the_papers():
    paper, ours = timed("paper", (1.0,), 1.0), timed("ours", (1.0,), 1.0)
    paper.memory["above_weights"] = 140
    assert records_of({"paper": paper, "ours": ours})["memory_over_paper"] == {
        "above_weights": 80 / 140,
        "above_weights_and_optimizer": 60 / 120,
    }


def test_two_layers_have_the_proportions_of_the_whole_model():
    for few, whole, bound in (("130m", "llama_130m", 1.13), ("350m", "llama_350m", 1.21), ("1b", "llama_1b", 1.32)):
        shapes = [SHAPES[few], SHAPES[whole]]
        assert shapes[0].vocab_size == round(shapes[1].vocab_size * shapes[0].layers / shapes[1].layers)
        same = {name for name in Shape.model_fields if getattr(shapes[0], name) == getattr(shapes[1], name)}
        assert same >= {"hidden_size", "intermediate_size", "heads", "rank", "sequence_length"}
        assert bounds_of(shapes[1]) == pytest.approx(bound, abs=0.015)  # of the counted table
        assert bounds_of(shapes[0].model_copy(update={"sequences": 32})) == pytest.approx(bound, abs=0.015)


def bounds_of(shape: Shape) -> float:
    """FLOPs of a full-rank step over those of ours in its best order, on the meta device: counted, not measured."""
    full = arms._wrapped_weights(shape) * 6 + arms._other_flops(shape)
    d, ff = shape.hidden_size, shape.intermediate_size
    sides = [(d, d)] * 4 + [(d, ff)] * 2 + [(ff, d)]
    layers = [LayerShape(shape.tokens, inner, (outer,), shape.rank) for inner, outer in sides]
    ours = sum(min(flops_per_token(order, layer) for order in candidates(layer)) for layer in layers)
    return full / (ours * shape.layers + arms._other_flops(shape))


def test_an_arm_that_cannot_be_built_is_one_error():
    broken = TINY.model_copy(update={"heads": 3})
    with pytest.raises(TrainerCrashedError, match=r"The benchmark's arm 'full' ended early: .*Take a smaller shape"):
        measure({"full": ArmRequest(arm="full", shape=broken)}, rounds=1, steps=1)


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    file = tmp_path / "bench.json"
    command = ["bench", "tiny", "--rounds", "1", "--steps", "1", "--threads", "1", "--output", str(file)]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--arm", "paper", "--arm", "ours", "--arm", "ours-fast"])
    assert ended.value.code == 0
    record = json.loads(file.read_text())
    measured = record["shapes"]["tiny"]
    found = measured["arms"]
    assert list(found) == ["paper", "ours", "ours-fast"]
    assert found["paper"]["speed_over"]["paper"]["median"] == 1
    assert measured["memory_over_paper"]["above_weights"] > 0
    assert found["ours-fast"]["matmul_precision"].startswith(("highest (", "high (", "medium ("))
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("x paper", "ours-fast multiplies at", "forward split", "peak memory", record["versions"]["torch"]):
        assert word in shown, word
    with pytest.raises(SystemExit) as ended:
        main([*command, "--arm", "theirs"])
    assert ended.value.code == 2 and "There is no arm 'theirs'" in capsys.readouterr().err


def test_a_wrong_name_is_said_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("relora_train.cli.bench.measure", None)  # calling it would fail
    with pytest.raises(SystemExit) as ended:
        main(["bench", "9m", "huge"])
    assert ended.value.code == 2 and "There is no shape 'huge' to measure" in capsys.readouterr().err


def test_what_was_found_is_told_in_lines():
    full, ours = timed("ours-full", (1.2,), 120.0), timed("ours", (1.0,), 100.0)
    none, same = timed("ours", (0.8,), 100.0), timed("ours", (0.9,), 100.0)
    results = {"paper": full, "ours-full": full, "ours": ours, "ours p=0": none, "ours p=0 split": same}
    record = {**about_this_machine(), "precision": "float32", "dropout": 0.1}
    record["shapes"] = {"tiny": {"shape": TINY.model_dump(), **records_of(results)}}
    shown = [part.plain for part in bench_view(record) if isinstance(part, Text)]
    for line in (
        "ours / ours-full: 1.20 (1.20–1.20) times as fast, 100% (100% to 100%) of the 1.20 that FLOPs allow here",
        "dropout 0.1 costs of a step: total +25.0% (+25.0% to +25.0%), order +12.5%",
        "peak memory, ours / paper: 1.00 above weights and optimizer, 1.00 above weights alone",
    ):
        assert any(line in text for text in shown), (line, shown)


def test_the_order_of_dropout_can_be_had_without_it():
    shape = TINY.model_copy(update={"sequences": 128})
    cpu, tokens = torch.device("cpu"), torch.randint(TINY.vocab_size, (128, 33))
    request = ArmRequest(arm="ours", shape=shape, dropout=0.0)
    best, split = (build_arm(r, cpu) for r in (request, request.model_copy(update={"as_with_dropout": True})))
    assert any("merged" in order for order in best.notes.values())
    assert set(split.notes.values()) == {str(REFERENCE)}
    assert split.flops_per_token != best.flops_per_token
    torch.testing.assert_close(split.step(tokens), best.step(tokens))


def test_an_unknown_shape_names_the_known_ones(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "huge"])
    assert ended.value.code == 2 and "20m, 20m-32k, 35m" in capsys.readouterr().err
