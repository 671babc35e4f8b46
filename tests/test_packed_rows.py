"""Answers are learned from their own conversation alone, as a mean over a batch, whatever shares or shards it."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instructions import CHATML, record, write_records
from safetensors.torch import load_file
from stage_runs import CPU, metrics_of, run_all, stage_request, tiny_profile
from test_documents import END, gradients, made
from test_snapshot import run_with_stops
from torch import Tensor
from torch.nn import functional as F

from relora_train.data.mixed_dataset import open_tokens
from relora_train.data.packed_dataset import FIRST, pack
from relora_train.data.prepare import prepare_dataset
from relora_train.distributed import Ranks, full_tensor
from relora_train.runs.workers import run_worker
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.training.build import prepare_stage
from relora_train.training.files import write_manifest
from relora_train.training.models.causal_lm import NextTokenLoss

LENGTH = 64
MASK = {"batch": {"documents": "mask", "sequence_length": LENGTH}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    (directory / "chat.jinja").write_text(CHATML)
    path = write_records(directory / "a.jsonl", [record(seed) for seed in range(150)])
    instructions = {"messages": "messages", "chat_template": str(directory / "chat.jinja")}
    data = DataConfig(source="jsonl", paths=(str(path),), workers=1, instructions=instructions)
    prepared = prepare_dataset(data, TokenizerConfig(vocab_size=300), directory / "work")
    write_manifest(prepared.manifest, prepared.directory)
    return prepared.directory


# --- rows


@given(sizes=st.lists(st.integers(1, 40), max_size=700))
def test_packing_is_first_fit_by_decreasing_length_in_each_window(sizes: list[int]):
    expected, first_row = [0] * len(sizes), 0
    for start in range(0, len(sizes), 256):
        window, room = sizes[start : start + 256], list[int]()
        for place in sorted(range(len(window)), key=lambda place: (-window[place], place)):
            row = next((row for row, left in enumerate(room) if left >= window[place]), len(room))
            room += [40] if row == len(room) else []
            room[row] -= window[place]
            expected[start + place] = first_row + row
        first_row += len(room)
    assert pack(np.array(sizes, dtype=np.int64), 40).tolist() == expected


def examples_of(dataset: Path, length: int, too_long: Any = "cut") -> tuple[set[tuple[int, ...]], dict[str, int]]:
    """The examples in all rows, less padding, and the counts of what was too long."""
    data = open_tokens(dataset, "train", sequence_length=length, seed=0, too_long=too_long)
    found = set()
    for row in data.read_blocks(0, data.blocks):
        begins = [*np.flatnonzero(row < -FIRST).tolist(), length + 1]
        found |= {tuple(row[start:end].tolist()) for start, end in itertools.pairwise(begins)}
    return {example for example in found if max(example) >= 0}, data.left_out


@pytest.mark.parametrize("too_long", ["cut", "drop"])
@pytest.mark.parametrize("length", [20, LENGTH])
def test_what_is_longer_than_a_row_is_cut_at_its_end_or_left_out_and_counted(dataset: Path, too_long: Any, length: int):
    whole, nothing = examples_of(dataset, 1000)
    assert nothing == {"cut": 0, "dropped": 0}
    found, counts = examples_of(dataset, length, too_long)
    long = {example for example in whole if len(example) > length + 1}
    cut = {example for example in long if max(example[: length + 1]) >= 0} if too_long == "cut" else set()
    assert counts == {"cut": len(cut), "dropped": len(long) - len(cut)} and len(long) > len(cut)
    assert found == (whole - long) | {example[: length + 1] for example in cut}


# --- loss and gradient


def packed(*examples: tuple[list[int], list[int]], length: int = 30) -> Tensor:
    """A row of examples: their ids, and which of them are to be predicted."""
    row: list[int] = []
    for ids, scored in examples:
        row += [~(ids[0] + FIRST), *(i if learned else ~i for i, learned in zip(ids[1:], scored[1:], strict=True))]
    padding = [~(END + FIRST), *[~END] * length][: length - len(row)]
    return torch.tensor(row + padding)


EXAMPLES = [
    ([5, 6, END, 8, 9, 10, END], [0, 0, 0, 1, 1, 0, 1]),  # the end of a text inside an example divides nothing
    ([11, 12, 13], [1, 1, 1]),
    ([20, 21, 22, 23, 24, 25, 26, 27], [0, 0, 0, 0, 0, 0, 0, 1]),
    ([7, 7], [0, 1]),
]


@pytest.mark.parametrize("family", ["llama", "llama, as in training", "gpt_neox, as in training", "mistral"])
def test_a_row_has_the_loss_and_the_gradient_of_its_answers_one_example_at_a_time(family: str):
    model = made(family, {})
    rows = torch.stack([packed(*EXAMPLES), packed(EXAMPLES[2]), packed(EXAMPLES[1], EXAMPLES[0])])
    plain = torch.tensor([[5, END, *range(6, 34)]])  # of a mixture: all of it is to be predicted
    expected, terms = torch.zeros(()), 0
    for ids, scored in [
        *EXAMPLES,
        EXAMPLES[2],
        EXAMPLES[1],
        EXAMPLES[0],
        ([5, END], [0, 1]),
        (plain[0, 2:].tolist(), [1] * 28),
    ]:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        learned = torch.tensor(scored[1:]).bool()
        expected = expected + F.cross_entropy(logits[learned], torch.tensor(ids[1:])[learned], reduction="sum")
        terms += int(learned.sum())
    exact = gradients(model, expected)
    loss_function = NextTokenLoss(model, END, packed=True)
    batch = torch.cat([rows, plain])
    loss = loss_function.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(model, loss).items():
        assert (gradient - exact[name]).abs().max() <= 1e-5 * exact[name].abs().max(), name
    assert loss_function.terms(batch) == terms
    sums = loss_function.sums(batch)
    assert sums.tolist() == pytest.approx([expected.item(), terms], rel=1e-6)
    assert loss_function.logits(batch).isfinite().all()


def test_rows_of_plain_text_have_the_same_bits_whether_examples_may_be_among_them():
    model = made("llama", {})
    rows = torch.tensor([[5, 6, END, 7, *range(8, 34)], [END, *range(5, 34)]])
    ours, theirs = NextTokenLoss(model, END), NextTokenLoss(model, END, packed=True)
    assert torch.equal(ours.loss(rows), theirs.loss(rows)) and ours.terms(rows) == theirs.terms(rows)


def update(dataset: Path, ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """Loss and gradient of the first update."""
    batch = {**MASK["batch"], **sections.pop("batch", {})}
    profile = tiny_profile(batch=batch, optimizer={"max_grad_norm": None}, **sections)
    training = prepare_stage(stage_request(profile, "warm-start", dataset, dataset.parent / "out"), ranks)
    loss, _ = training.update(1)
    gradient = [full_tensor(p.grad).flatten() for p in training.trainable]
    return {"loss": float(loss), "gradient": torch.cat(gradient).tolist()}


RANK = """
import json, sys
import torch, torch.distributed as dist
from pathlib import Path
from relora_train.distributed import Ranks
from test_packed_rows import update

rank, store, dataset = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
ranks = {kind: Ranks(rank, 2, torch.device("cpu"), sharded=kind == "full") for kind in ("none", "full")}
found = [
    update(dataset, ranks[kind], batch={"micro_sequences": 2}, launch={"nproc_per_node": 2, "sharding": kind})
    for kind in ranks
]
Path(f"{store}-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


def test_micro_batches_and_ranks_that_share_or_shard_the_model_make_the_update_of_one_big_batch(dataset: Path):
    store = dataset.parent / "store"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", RANK]
    processes = [subprocess.Popen([*command, str(rank), str(store), str(dataset)], env=environment) for rank in (0, 1)]
    alone = update(dataset, CPU)
    assert [process.wait(240) for process in processes] == [0, 0]
    of_ranks = [one for rank in (0, 1) for one in json.loads(Path(f"{store}-{rank}.json").read_text())]
    assert len(of_ranks) == 4
    rows = torch.from_numpy(open_tokens(dataset, "train", sequence_length=LENGTH, seed=0).read_batch(0, 8))
    terms = (rows >= 0).sum(1)
    assert terms.max() > 1.5 * terms.min()  # else a mean of means would do
    expected = torch.tensor(alone["gradient"])
    micro_batches = [update(dataset, CPU, batch={"micro_sequences": size}) for size in (1, 4)]
    for other in of_ranks + micro_batches:
        assert other["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        found = torch.tensor(other["gradient"])
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# --- in a run


def test_a_run_learns_scores_answers_alone_and_resumes_bit_for_bit(dataset: Path, tmp_path: Path):
    profile = tiny_profile(batch={**MASK["batch"], "micro_sequences": 2}, schedule={"cycles": 1})
    whole = run_all(profile, dataset, tmp_path / "whole")
    first, last = (metrics_of(whole[stage], "evaluation") for stage in ("warm-start", "cycle-1"))
    assert last[-1]["val_loss"] < first[0]["val_loss"] - 0.1
    rows = open_tokens(dataset, "val", sequence_length=LENGTH, seed=0)
    taken = rows.read_spread(0, min(16, rows.blocks), of=min(16, rows.blocks))
    assert last[-1]["val_tokens"] == (taken >= 0).sum()
    request = stage_request(profile, "warm-start", dataset, tmp_path / "again" / "warm-start")
    run_with_stops(request, [2, 5], tmp_path / "snapshots")
    following = stage_request(profile, "cycle-1", dataset, tmp_path / "again" / "cycle-1", request.output_directory)
    run_with_stops(following, [9], tmp_path / "more-snapshots")
    for stage in whole:
        ours, theirs = (load_file(tmp_path / root / stage / "model.safetensors") for root in ("again", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_process_of_its_own_tells_once_how_many_examples_were_too_long(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    profile = tiny_profile(**MASK, schedule={"warm_start_steps": 1, "warmup_steps": 1})
    request = stage_request(profile, "warm-start", dataset, tmp_path / "warm-start")
    run_worker("relora_train.training.trainer", request, tmp_path / "request.json", on_event=lambda event: None)
    left_out = open_tokens(dataset, "train", sequence_length=LENGTH, seed=0).left_out
    told = f"longer than a sequence: {left_out['cut']} cut to its length and {left_out['dropped']} left out"
    assert sum(told in record.getMessage() for record in caplog.records) == 1
