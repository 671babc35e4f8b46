"""`relora bench` compares steps that do the same work: all arms learn, and its numbers are those it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relora_train.benchmarking.measure import ArmResult, measure, speed_ratio
from relora_train.benchmarking.request import ARMS, ArmRequest, Shape
from relora_train.cli import main
from relora_train.errors import TrainerCrashedError

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


def test_an_arm_that_cannot_be_built_is_one_error():
    broken = TINY.model_copy(update={"heads": 3})
    with pytest.raises(TrainerCrashedError, match=r"The benchmark's arm 'full' ended early: .*Take a smaller shape"):
        measure({"full": ArmRequest(arm="full", shape=broken)}, rounds=1, steps=1)


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("relora_train.console.bench.SHAPES", {"tiny": TINY})
    monkeypatch.setattr("relora_train.console.bench.ARMS", ("paper", "ours"))
    file = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "tiny", "--rounds", "1", "--steps", "1", "--threads", "1", "--output", str(file)])
    assert ended.value.code == 0
    record = json.loads(file.read_text())
    arms = record["shapes"]["tiny"]["arms"]
    assert set(arms) == {"paper", "ours", "ours-fast"}
    assert arms["paper"]["speed_over"]["paper"]["median"] == 1
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("x paper", "ours-fast", "forward split", record["versions"]["torch"]))


def test_an_unknown_shape_names_the_known_ones(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "huge"])
    assert ended.value.code == 2 and "20m, 20m-32k, 35m" in capsys.readouterr().err
