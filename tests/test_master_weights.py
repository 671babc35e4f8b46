"""Merged exact weights lie on the disk until they are committed, and nothing of them stays there."""

from __future__ import annotations

from pathlib import Path

import torch

from relora_train.training.masters import MasterWeights

ENTRIES = 10_000_000
"""40 MB a weight: what is smaller the C library keeps for itself when it is freed."""


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
