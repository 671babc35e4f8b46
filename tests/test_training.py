"""A stage is prepared from its request alone, and an update's random numbers follow from the seed and its place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from stage_runs import CPU, prepared, stage_request, tiny_profile

from relora_train.errors import CorpusTooSmallError
from relora_train.training import build as module
from relora_train.training.build import prepare_stage
from relora_train.training.files import MasterWeights

ENTRIES = 10_000_000
"""40 MB a weight: what is smaller the C library keeps for itself when it is freed."""


def test_dropout_is_drawn_as_in_the_runs_that_were_made_before(warm_start: Path, dataset: Path, tmp_path: Path):
    """Another seed would be as random, but a run of yesterday would go on with other bits."""
    training = prepared(warm_start, dataset, tmp_path, seed=5, batch={"micro_sequences": 4})
    training.update(9)
    digest = hashlib.blake2b(b"5/9/1/0", digest_size=8).digest()  # seed, step, second and last micro-step, rank
    assert torch.initial_seed() == int.from_bytes(digest, "little") >> 1


def test_the_optimizer_has_the_settings_of_its_profile(warm_start: Path, dataset: Path, tmp_path: Path):
    optimizer = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    training = prepared(warm_start, dataset, tmp_path, optimizer=optimizer)
    for group in training.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0)
    assert training.model.training, "with its dropout"


def test_a_corpus_that_is_too_small_is_refused_before_a_model_is_made(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def made(*arguments: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(module, "_whole_model", made)
    request = stage_request(tiny_profile(batch={"sequences": 100_000}), "warm-start", dataset, tmp_path)
    with pytest.raises(CorpusTooSmallError, match="100,000 are needed"):
        prepare_stage(request, CPU)


def test_master_weights_are_the_parents_until_they_are_written(tmp_path: Path):
    read: list[str] = []
    parent: Mapping[str, torch.Tensor] = {name: torch.full((2,), float(i)) for i, name in enumerate("ba")}
    masters = MasterWeights(list(parent), lambda name: read.append(name) or parent[name], tmp_path)
    assert (list(masters), len(masters), "c" in masters) == (["a", "b"], 2, False)
    masters["a"] = torch.tensor([7.0, 7.0])
    assert {name: masters[name].tolist() for name in masters} == {"a": [7.0, 7.0], "b": [0.0, 0.0]}
    assert read == ["b"]
    with pytest.raises(KeyError, match="c"):
        masters["c"]
    with pytest.raises(TypeError, match="cannot be removed"):
        del masters["a"]


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_merged_weights_are_read_back_bit_for_bit_and_take_no_memory(tmp_path: Path):
    names = [str(number) for number in range(6)]
    drawn = torch.randn(1000, ENTRIES // 1000)
    masters = MasterWeights(names, lambda name: drawn + int(name), tmp_path)
    before = own_bytes()  # with the one that all are made from
    for name in names:
        weight = masters[name]
        masters[name] = weight.mul_(2)
        del weight
    assert own_bytes() - before < 4 * ENTRIES, "of six weights not one is held"
    assert all(torch.equal(masters[name], (drawn + int(name)) * 2) for name in names)
    assert not list(tmp_path.iterdir())


def test_a_rank_without_rows_and_a_machine_without_the_directory_have_theirs_too(tmp_path: Path):
    masters = MasterWeights(["a", "b"], lambda name: torch.ones(3), tmp_path / "elsewhere")
    masters["a"], masters["b"] = torch.empty(0, 4), torch.tensor([[1.0, float("nan")]])
    assert masters["a"].shape == (0, 4) and masters["b"].shape == (1, 2) and masters["b"].isnan().any()
