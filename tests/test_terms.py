"""The mean of an update is that over all terms of its batch, however they are spread over micro-batches and ranks."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import CPU, stage_request, tiny_profile
from tiny_data import VOCABULARY, write_tiny_dataset
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.distributed import Ranks
from relora_train.training.build import prepare_stage
from relora_train.training.gradient_sum import GradientSum
from relora_train.training.step import Prefetcher

SEQUENCES = 7


class Uneven:
    """A LossFunction that scores tokens below the first of their row: none of some rows, almost all of others."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @staticmethod
    def scored(examples: Tensor) -> Tensor:
        return examples[:, 1:] < examples[:, :1] - 8

    def terms(self, examples: Tensor) -> Tensor:
        return self.scored(examples).sum()

    def logits(self, examples: Tensor) -> Tensor:
        return self._model(examples[:, :-1])

    def loss(self, examples: Tensor) -> Tensor:
        scored = self.scored(examples)
        return F.cross_entropy(self.logits(examples)[scored], examples[:, 1:][scored], reduction="sum")

    def sums(self, examples: Tensor) -> Tensor:
        raise NotImplementedError


def update(dataset: Path, ranks: Ranks, dtype: torch.dtype, micro_sequences: int | None) -> dict[str, Any]:
    """Return loss, gradient and terms of each row of one update."""
    profile = tiny_profile(batch={"sequences": SEQUENCES}, optimizer={"max_grad_norm": None})
    training = prepare_stage(stage_request(profile, "warm-start", dataset, dataset.parent / "out"), CPU)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Tanh(), nn.Linear(8, VOCABULARY)).to(dtype)
    uneven = profile.batch.model_copy(update={"micro_sequences": micro_sequences})  # a profile's would divide them
    training = dataclasses.replace(
        training,
        request=training.request.model_copy(update={"profile": profile.model_copy(update={"batch": uneven})}),
        ranks=ranks,
        model=model,
        loss_function=Uneven(model),
        optimizer=torch.optim.AdamW(model.parameters()),
        batches=Prefetcher(training.train_data, sequences=SEQUENCES, ranks=ranks),
        gradient_sum=GradientSum(model.parameters(), ranks),
    )
    loss, norm = training.update(1)
    rows = torch.from_numpy(training.train_data.read_batch(0, SEQUENCES))
    return {
        "loss": float(loss),
        "norm": float(norm),
        "gradient": torch.cat([p.grad.flatten() for p in model.parameters()]).tolist(),
        "terms": Uneven.scored(rows).sum(1).tolist(),
    }


RANK = """
import json, sys
import torch, torch.distributed as dist
from pathlib import Path
from relora_train.distributed import Ranks
from test_terms import update

rank, store, dataset = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
ranks = Ranks(rank, 2, torch.device("cpu"))
found = {name: update(dataset, ranks, getattr(torch, name), 2) for name in ("float32", "float64")}
Path(f"{store}-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def by_two_ranks(dataset: Path) -> list[dict[str, Any]]:
    store = dataset.parent / "store"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", RANK]
    processes = [subprocess.Popen([*command, str(rank), str(store), str(dataset)], env=environment) for rank in (0, 1)]
    assert [process.wait(120) for process in processes] == [0, 0]
    return [json.loads(Path(f"{store}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-6), ("float64", 1e-12)])
def test_micro_batches_and_ranks_with_uneven_terms_make_the_mean_of_one_big_batch(
    dataset: Path, by_two_ranks: list[dict[str, Any]], dtype: str, rounding: float
):
    alone = update(dataset, CPU, getattr(torch, dtype), None)
    assert 0 in alone["terms"] and max(alone["terms"]) > 20  # else a mean of means would do
    expected = torch.tensor(alone["gradient"], dtype=torch.float64)
    for other in (update(dataset, CPU, getattr(torch, dtype), 2), *(found[dtype] for found in by_two_ranks)):
        assert other["loss"] == pytest.approx(alone["loss"], rel=1e-6)  # summed in float32
        found = torch.tensor(other["gradient"], dtype=torch.float64)
        assert (found - expected).abs().max() <= rounding * expected.abs().max()
        assert other["norm"] == pytest.approx(alone["norm"], rel=1e-6)


def test_a_batch_without_terms_changes_nothing_by_its_loss(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Uneven, "scored", staticmethod(lambda examples: torch.zeros_like(examples[:, 1:]).bool()))
    found = update(dataset, CPU, torch.float32, 2)
    assert found["loss"] == found["norm"] == 0
