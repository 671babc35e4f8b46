"""`relora bench` times the step that trains: both arms learn, and its numbers are those it took."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from relora_train.cli.bench import bench_view
from relora_train.cli.output import show
from relora_train.errors import ConfigError, TrainerCrashedError
from relora_train.experiments.bench import (
    FULL,
    RELORA,
    StepRequest,
    StepResult,
    measure,
    one_pass,
    speed_ratio,
    step_requests,
)
from relora_train.runs.plan import plan
from relora_train.settings.load import load_profile

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import step as peers

TINY = {
    "tokenizer.vocab_size": 512, "model.hidden_size": 32, "model.intermediate_size": 88, "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2, "relora.rank": 4, "relora.dropout": 0.1, "batch.sequences": 4,
    "batch.sequence_length": 32, "optimizer.learning_rate": 1e-2, "optimizer.warm_start_learning_rate": 1e-2,
    "launch.threads": 1, "precision.matmul_precision": "highest",
}  # fmt: skip


def tiny_requests(**more: object) -> dict[str, StepRequest]:
    return step_requests(load_profile("quickstart", {**TINY, **more}), updates=20)


@pytest.fixture(scope="module")
def results() -> dict[str, StepResult]:
    """Of ours and the peers in tests/benchmarks/step.py."""
    return measure(peers.arms(tiny_requests()), rounds=2, steps=8, what="tiny", worker=(peers.__file__, "--worker"))


def test_every_arm_trains_the_same_model(results: dict[str, StepResult]):
    assert list(results) == ["full", "paper", "peft", FULL, RELORA]
    for arm, result in results.items():
        assert len(result.seconds) == 2 and min(result.seconds) > 0, arm
        assert result.loss < 6.0, (arm, result.loss)  # it began at log 512 = 6.24
    sizes = {arm: result.memory["weights"] for arm, result in results.items()}
    assert sizes["full"] == sizes[FULL] < sizes[RELORA] == sizes["paper"] == sizes["peft"]
    assert results[RELORA].memory["optimizer"] == pytest.approx(results["paper"].memory["optimizer"], rel=0.01)
    assert results[RELORA].memory["gradients"] == results["paper"].memory["gradients"]


def test_flops_are_those_of_the_plan_and_the_share_of_the_peak_follows(results: dict[str, StepResult]):
    planned = plan(load_profile("quickstart", TINY))
    assert results[FULL].request.flops_per_token == planned.full.flops_per_token
    assert results[RELORA].request.flops_per_token == planned.low_rank.flops_per_token
    for result in results.values():
        speed = result.tokens_per_second * result.request.flops_per_token
        assert result.utilisation == pytest.approx(speed / result.matmul_flops)


def test_a_ratio_is_taken_round_by_round(results: dict[str, StepResult]):
    ours, full = results[RELORA], results[FULL]
    ratio = speed_ratio(ours, full)
    each = sorted(b / a for a, b in zip(ours.seconds, full.seconds, strict=True))
    assert (ratio["lowest"], ratio["highest"]) == (each[0], each[-1])
    assert speed_ratio(full, full)["median"] == 1


def test_an_update_is_one_forward_pass_of_the_profile():
    profile = load_profile("llama_130m", {"launch.nproc_per_node": 2})
    measured = one_pass(profile, updates=7)
    assert measured.batch.forward_passes(1) == (profile.batch.micro_sequences, 1)
    assert (measured.relora, measured.precision, measured.model) == (profile.relora, profile.precision, profile.model)


def test_an_arm_that_cannot_be_built_is_one_error():
    request = tiny_requests(**{"model.vocab_size": 600})[FULL]
    broken = request.model_copy(update={"vocab_size": 601})  # more tokens than the embedding has rows
    with pytest.raises(TrainerCrashedError, match=r"arm 'full rank' ended early: .*VocabularyMismatchError.*Take a"):
        measure({FULL: broken}, rounds=1, steps=1, what="")


def test_what_cannot_be_measured_is_refused_before_anything_is(monkeypatch, relora):
    monkeypatch.setattr("relora_train.experiments.bench.measure", None)  # calling it would fail
    refused = relora("bench", "smoke", "huge")
    assert refused.code == 2 and "huge" in refused.err
    with pytest.raises(ConfigError, match="measures language models"):
        step_requests(load_profile("digits"), updates=3)
    with pytest.raises(ConfigError, match=r"set model\.vocab_size"):
        step_requests(load_profile("quickstart", {"tokenizer.path": "t5-base"}), updates=3)


def test_the_command_prints_what_was_measured(relora):
    sets = [f"--set={key}={value}" for key, value in TINY.items()]
    record = json.loads(relora("bench", "quickstart", *sets, "--rounds", "1", "--steps", "1", "--json").out)
    arms = record["profiles"]["quickstart"]["arms"]
    assert list(arms) == [FULL, RELORA] and arms[FULL]["speed_over_first"]["median"] == 1
    assert arms[RELORA]["memory_bytes"]["above_weights"] > 0
    console = Console(width=100, file=io.StringIO())
    show(console, bench_view(record))
    shown = " ".join(console.file.getvalue().split())
    for word in ("quickstart: rank 4", "x full rank", "of peak", "rest of the peak", "products: highest", "torch 2."):
        assert word in shown, word
