"""Gradients over two ranks: sums of all, in buckets that leave while the backward pass goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from relora_train.method.rules import RuledAdamW
from relora_train.method.subspace import Subspace

RANK = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from relora_train.distributed import Ranks
from relora_train.training import gradient_sum
from relora_train.training.gradient_sum import GradientSum

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
gradient_sum._BUCKET_BYTES = 400
torch.manual_seed(0)
dtypes = [torch.float32] * 6 + [torch.bfloat16] * 2
layers = nn.ModuleList(nn.Linear(9, 9, bias=False, dtype=dtype) for dtype in dtypes)  # 324 bytes, and half of it
nobodys, seconds, whole = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(200))
parameters = [*layers.parameters(), nobodys, seconds, whole]
sums = GradientSum(parameters, Ranks(rank, 2, torch.device("cpu")))
events = []
all_reduce = dist.all_reduce
dist.all_reduce = lambda tensor, **options: (events.append(["sent", tensor.numel()]), all_reduce(tensor, **options))[1]

def backward(step):
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(10 * step + rank))
    for index, layer in enumerate(layers):
        x = layer(x.to(layer.weight.dtype))
        x.register_hook(lambda grad, index=index: events.append(["layer", index]))
    loss = x.float().sum() + whole.sum() * (step + 1)
    (loss + seconds.sum() if rank == 1 else loss).backward()

alone = []
for step in (0, 1):  # two micro-steps: the first is not sent
    if step == 0:
        backward(step)
        assert all(event[0] == "layer" for event in events)
        alone = [None if p.grad is None else p.grad.clone() for p in parameters]
        continue
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    with sums.during():
        backward(step)
found = [None if p.grad is None else p.grad.double().flatten().tolist() for p in parameters]
sent = list(events)
for p in parameters:
    p.grad = None
for step in (0, 1):
    backward(step)  # outside during(): nothing is sent
own = [None if p.grad is None else p.grad.double().flatten().tolist() for p in parameters]
later = len(events)

from relora_train.method.rules import RuledAdamW
from relora_train.method.subspace import Subspace

if rank == 1:  # another processor, with other roundings
    svd = torch.linalg.svd
    torch.linalg.svd = lambda matrix, **options: svd(matrix + 0.1 * matrix.sin(), **options)
weight = nn.Parameter(torch.zeros(6, 9))
sums = GradientSum([weight], Ranks(rank, 2, torch.device("cpu")))
optimizer = RuledAdamW([{"params": [weight], "rule": Subspace(2, 2, 1.0, residual=True)}], lr=0.1)
for step in range(5):
    weight.grad = None
    with sums.during():
        (weight * torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(step))[rank]).sum().backward()
    optimizer.step()
report = {"found": found, "own": own, "events": sent, "later": later, "fira": weight.tolist()}
json.dump(report, open(out, "w"))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("ranks")
    outs = [root / f"{rank}.json" for rank in (0, 1)]
    command = [sys.executable, "-c", RANK]
    processes = [
        subprocess.Popen([*command, str(rank), str(root / "store"), str(out)]) for rank, out in enumerate(outs)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    return [json.loads(Path(out).read_text()) for out in outs]


def test_each_rank_has_the_sum_over_both_and_over_all_micro_steps(ranks: list[dict[str, Any]]):
    first, second = ranks
    assert first["found"] == second["found"]
    for index, total in enumerate(first["found"]):
        parts = [rank["own"][index] for rank in ranks if rank["own"][index] is not None]
        expected = [sum(entries) for entries in zip(*parts, strict=True)] if parts else None
        assert total == (None if expected is None else pytest.approx(expected, rel=1e-2 if index in (6, 7) else 1e-6))
    assert first["found"][8] is None  # a gradient that no rank made is no zero: AdamW would move by it
    assert first["own"][9] is None and first["found"][9] == [2.0] * 5


def test_buckets_leave_in_one_order_while_the_backward_pass_goes_on(ranks: list[dict[str, Any]]):
    sent = [[size for kind, size in rank["events"] if kind == "sent"] for rank in ranks]
    assert sent[0] == sent[1] and len(sent[0]) > 4
    entries = 6 * 81 + 2 * 81 + 3 + 5 + 200
    assert sum(sent[0]) == entries + 11  # each once, and by how many ranks it was made
    for rank in ranks:
        last_layer = max(index for index, event in enumerate(rank["events"]) if event[0] == "layer")
        assert any(kind == "sent" for kind, _ in rank["events"][:last_layer])


def test_ranks_that_round_otherwise_take_the_first_ones_subspace_and_move_as_one_process(ranks: list[dict[str, Any]]):
    weight = nn.Parameter(torch.zeros(6, 9))
    optimizer = RuledAdamW([{"params": [weight], "rule": Subspace(2, 2, 1.0, residual=True)}], lr=0.1)
    for step in range(5):
        weight.grad = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(step)).sum(0)
        optimizer.step()
    assert ranks[0]["fira"] == ranks[1]["fira"]
    torch.testing.assert_close(torch.tensor(ranks[0]["fira"]), weight.detach())
