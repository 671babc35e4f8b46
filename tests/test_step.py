"""What one update costs beside its products: memory, waiting, graphs; and that none of it changes what is trained."""

import itertools
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from safetensors.torch import load_file
from stage_runs import CPU, ignore, manifest_of, metrics_of, prepared, run_all, stage_request, tiny_profile
from tiny_models import COMPILER_WARNINGS, tiny_gpt_neox, tiny_llama, token_batch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from relora_train.data.dataset import TokenDataset
from relora_train.distributed import Ranks
from relora_train.errors import DeviceError
from relora_train.method.layer import lora_parameters
from relora_train.method.merge import merge_and_reinit
from relora_train.method.reset import above_quantile, reset_optimizer_state
from relora_train.method.wrap import apply_relora
from relora_train.settings.method import OptimizerConfig
from relora_train.training import step as step_module
from relora_train.training.build import prepare_stage
from relora_train.training.models import chunked_loss, compiling
from relora_train.training.models.chunked_loss import added_classes, chunk_rows, chunked_cross_entropy
from relora_train.training.models.model import attend_without_mask
from relora_train.training.optimizer import build_optimizer
from relora_train.training.step import Prefetcher, StageTraining
from relora_train.training.trainer import run_stage

FILES = ("model.safetensors", "optimizer.safetensors", "training_state.json")


# --- gradient checkpointing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_no_bit(dataset: Path, tmp_path: Path, dtype: str):
    plain, recomputed = (
        run_all(
            tiny_profile(
                launch={"gradient_checkpointing": on},
                relora={"dropout": 0.3},
                batch={"micro_sequences": 4},
                schedule={"cycles": 1},
                precision={"dtype": dtype},
            ),
            dataset,
            tmp_path / str(on),
        )
        for on in (False, True)
    )
    for stage, checkpoint in plain.items():
        for name in FILES:
            assert (checkpoint / name).read_bytes() == (recomputed[stage] / name).read_bytes(), (stage, name)


def peak_of_an_update(request: Any) -> int:
    training = prepare_stage(request, CPU)
    with LiveBytes() as memory:
        training.update(1)
    return memory.peak


def test_gradient_checkpointing_takes_less_memory(dataset: Path, tmp_path: Path):
    model = {"num_hidden_layers": 8, "hidden_size": 32, "intermediate_size": 128}
    plain, recomputed = (
        peak_of_an_update(
            stage_request(
                tiny_profile(model=model, launch={"gradient_checkpointing": on}),
                "warm-start",
                dataset,
                tmp_path / str(on),
            )
        )
        for on in (False, True)
    )
    assert recomputed < 0.5 * plain


# --- the end of a cycle


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16 with masters"])
def test_merge_reinit_and_reset_take_no_more_than_one_layers_memory(rounded: bool):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(6)])
    names = apply_relora(model, rank=16, alpha=16, dropout=0.0, target_modules=[str(i) for i in range(6)], seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-2))
    for _ in range(2):
        model(torch.randn(32, 256)).square().sum().backward()
        optimizer.step()
    masters = None
    if rounded:
        masters = {f"{name}.weight": model.get_submodule(name).weight.detach().clone() for name in names}
        for name in names:
            layer = model.get_submodule(name)
            layer.weight.data = layer.weight.data.bfloat16()
    weights = [model.get_submodule(name).weight for name in names]
    places = [weight.data_ptr() for weight in weights]
    before = [weight.clone() for weight in weights]
    optimizer.zero_grad(set_to_none=True)
    with LiveBytes() as memory:
        merge_and_reinit(model, cycle=1, seed=0, masters=masters)
        reset_optimizer_state(optimizer, lora_parameters(model), mode="magnitude", ratio=0.99)
    assert 0 < memory.peak <= 256 * 256 * 4
    assert [weight.data_ptr() for weight in weights] == places
    assert not any(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.99, 1.0])
def test_the_threshold_of_a_reset_is_the_same_by_selection_and_by_sorting(ratio: float):
    """The first on a CPU, the second on a GPU, where the values then stay."""
    values = torch.randn(1001).abs().round(decimals=2)  # with ties
    rank = int(ratio * 1000)
    assert torch.equal(above_quantile(values, ratio), values > values.sort().values[rank])


# --- no waiting for the device


READS = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), int(), bool()
    torch.ops.aten.nonzero.default,  # a boolean index
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
}
"""What makes the host wait until a GPU has done all it was given."""


class CountsReads(TorchDispatchMode):
    """How often a result was waited for, by the step that the training was at."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.reads: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads[self.step] += function in READS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"batch": {"micro_sequences": 2}, "relora": {"dropout": 0.3}},
        {"precision": {"dtype": "bfloat16"}, "launch": {"gradient_checkpointing": True}},
        {"precision": {"dtype": "pure-bfloat16"}},
    ],
    ids=["plain", "dropout", "bfloat16", "pure-bfloat16"],
)
def test_an_update_waits_for_nothing(warm_start: Path, dataset: Path, tmp_path: Path, sections: dict):
    training = prepared(warm_start, dataset, tmp_path, **sections)
    with CountsReads() as counted:
        losses = [training.update(step)[0] for step in (7, 8)]
    assert counted.reads[0] == 0
    with counted:
        float(losses[0])
    assert counted.reads[0] == 1  # the counter sees what it looks for


def test_between_two_records_a_stage_waits_for_nothing(
    warm_start: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    profile = tiny_profile(logging={"every_steps": 4}, schedule={"cycle_length": 14})
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "out", warm_start)
    counted, update = CountsReads(), StageTraining.update

    def noted(training: StageTraining, step: int) -> Any:
        counted.step = step
        return update(training, step)

    monkeypatch.setattr(StageTraining, "update", noted)
    with counted:
        run_stage(request, ignore)
    waited = {step for step in range(7, 20) if counted.reads[step]}
    assert waited == {record["step"] for record in metrics_of(tmp_path / "out")} - {20}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt_neox])
def test_attention_without_a_mask_is_the_same_causal_attention(make: Any):
    tokens, later = token_batch(), token_batch(seed=1)
    later[:, :9] = tokens[:, :9]
    model = make().eval()
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        attend_without_mask(model)
        assert torch.equal(model(tokens, use_cache=False).logits, expected)
        assert torch.equal(model(later, use_cache=False).logits[:, :9], expected[:, :9])


def test_a_checkpoint_does_not_tell_of_it(warm_start: Path):
    assert "without_mask" not in (warm_start / "config.json").read_text()


# --- reading ahead


def test_what_is_read_ahead_is_what_is_asked_for(dataset: Path):
    data, again = (TokenDataset(dataset, "train", sequence_length=32, seed=3) for _ in range(2))
    ranks = Ranks(rank=1, world_size=2, device=torch.device("cpu"))
    batches = Prefetcher(data, sequences=6, ranks=ranks)
    for position in (0, 6, 12, 600, 606, 6, 0):  # in order, and after a jump
        expected = again.read_batch(position, 6, rank=1, world_size=2)
        assert np.array_equal(batches.batch(position).numpy(), expected)


def test_the_next_batch_is_read_on_another_thread_while_this_one_is_used(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a clock that only reading moves on: a second for each batch."""
    data, readers = TokenDataset(dataset, "train", sequence_length=32), []
    real = data.read_batch

    def slow(position: int, *arguments: Any, **options: Any) -> Any:
        readers.append((position, threading.current_thread() is threading.main_thread()))
        return real(position, *arguments, **options)

    monkeypatch.setattr(data, "read_batch", slow)
    monkeypatch.setattr(step_module.time, "perf_counter", lambda: float(len(readers)))
    batches = Prefetcher(data, sequences=4, ranks=CPU)
    batches.batch(0, last=True)
    assert batches.take_seconds_waited() == 1
    batches.batch(4)
    ahead = batches._ahead
    assert ahead is not None and ahead[1].result(timeout=60) is not None  # during the update
    batches.take_seconds_waited()
    batches.batch(8, last=True)
    assert batches.take_seconds_waited() == 0
    assert readers == [(0, False), (4, False), (8, False)]


def test_a_slow_loader_shows_in_the_records(
    warm_start: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What was waited since the last record, over the time since then, which the tokens and their rate tell."""
    profile = tiny_profile()
    monkeypatch.setattr(Prefetcher, "take_seconds_waited", lambda batches: 0.125)
    run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out", warm_start), ignore)
    records = metrics_of(tmp_path / "out")
    for before, record in itertools.pairwise(records):
        tokens = (record["step"] - before["step"]) * profile.batch.tokens
        assert record["data_wait_share"] == pytest.approx(0.125 * record["tokens_per_second"] / tokens)
    assert len(records) > 5


# --- torch.compile


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cold compiler that leaves nothing behind."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "graphs"))
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch({"compile_threads": 1}):
        yield counters
    torch._dynamo.reset()


@COMPILER_WARNINGS
def test_a_compiled_stage_has_the_losses_of_an_eager_one_and_one_graph_for_all_cycles(
    warm_start: Path, dataset: Path, tmp_path: Path, compiler: Any
):
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        parent = warm_start
        profile = tiny_profile(launch={"compile": compiled}, evaluation={"batch_sequences": 5})
        for stage in ("cycle-1", "cycle-2"):
            output = tmp_path / f"{compiled}" / stage
            request = stage_request(profile, stage, dataset, output, parent)
            run_stage(request.model_copy(update={"dropout_mask": "hash"}), ignore)
            parent = output
            losses.setdefault(compiled, []).extend(record["loss"] for record in metrics_of(output))
            losses[compiled].append(manifest_of(output)["evaluation"]["val_loss"])
            if compiled:
                # The probe's, a block's, the loss's: two blocks, a merge, batches of 5 and 1 sequences make no other.
                assert compiler["stats"]["unique_graphs"] == 3, stage
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)  # rounding, grown over 16 steps
    assert losses[True] != losses[False]  # it did compile
    files = [load_file(tmp_path / name / "cycle-2" / "model.safetensors") for name in ("True", "False")]
    assert files[0].keys() == files[1].keys()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "True" / "cycle-2")
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in files[0].items())


@COMPILER_WARNINGS
def test_a_machine_that_cannot_compile_says_so_before_training(
    warm_start: Path, dataset: Path, tmp_path: Path, compiler: Any
):
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        pytest.raises(DeviceError, match=r"launch\.compile is on.*C\+\+.*set launch\.compile to false"),
    ):
        prepared(warm_start, dataset, tmp_path, launch={"compile": True}, relora={"dropout": 0.0})


@COMPILER_WARNINGS
def test_a_compiled_model_keeps_its_names(warm_start: Path, dataset: Path, tmp_path: Path):
    eager = prepared(warm_start, dataset, tmp_path).model
    names = list(eager.state_dict())
    for block in compiling.blocks(eager):
        block.compile()
    assert list(eager.state_dict()) == names and len(compiling.blocks(eager)) == 2


ROWS, WIDTH, CLASSES = 70, 16, 37


def _problem(dtype: torch.dtype, *, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH), *([torch.randn(CLASSES)] if bias else [])]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], torch.randint(CLASSES, (ROWS,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [ROWS, 32, 7])  # one chunk, a shorter last one, equal ones
@pytest.mark.parametrize("added", [0, 27])  # as on a GPU, to 64
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunks_change_neither_the_loss_nor_its_gradients(
    dtype: torch.dtype, tolerance: float, added: int, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "chunk_rows", lambda *sizes: rows)
    monkeypatch.setattr(chunked_loss, "added_classes", lambda *sizes: added)
    ours, targets = _problem(dtype, bias=bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    hidden, weight, *rest = ours
    loss = chunked_cross_entropy(hidden, weight, rest[0] if rest else None, targets)
    (loss / ROWS).backward()
    reference = F.cross_entropy(F.linear(exact[0], exact[1], *exact[2:]), targets, reduction="sum")
    (reference / ROWS).backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=tolerance)
    for tensor, right in zip(ours, exact, strict=True):
        assert tensor.grad is not None and right.grad is not None and tensor.grad.dtype == dtype
        assert (tensor.grad.double() - right.grad).norm() < tolerance * right.grad.norm()


def test_an_answer_of_hardly_any_probability_has_a_finite_loss() -> None:
    hidden, weight = torch.full((1, 1), 400.0, requires_grad=True), torch.tensor([[1.0], [0.0]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, None, torch.tensor([1]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 400.0
    assert hidden.grad is not None and float(hidden.grad) == 1.0


def trained(
    rows: int, width: int, classes: int, *, certainty: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head and answers in bfloat16; the higher the certainty, the likelier the model finds them."""
    torch.manual_seed(1)
    weight, targets = torch.randn(classes, width) * 0.02, torch.randint(classes, (rows,))
    hidden = torch.randn(rows, width) + certainty * weight[targets] / (0.02**2 * width)
    return hidden.bfloat16(), weight.bfloat16(), targets


@pytest.mark.parametrize("certainty", [0.0, 5.0])
def test_under_bfloat16_the_loss_over_many_chunks_is_exact(certainty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in bfloat16 stands still once a chunk's share is below a 256th of it: 5 % off over these 64 chunks."""
    hidden, weight, targets = trained(8192, 64, 4000, certainty=certainty)
    monkeypatch.setattr(chunked_loss, "chunk_rows", lambda *sizes: 128)  # as torch takes on a GPU
    with torch.no_grad():
        exact = F.cross_entropy(F.linear(hidden.double(), weight.double()), targets, reduction="sum")
        found = chunked_cross_entropy(hidden, weight, None, targets)
    assert float(found) == pytest.approx(float(exact), rel=1e-4)


def test_on_a_gpu_the_loss_goes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is none: shapes and dtypes alone."""
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)  # torch's, which sums in bfloat16
    with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        hidden = torch.empty(8192, 64, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(32_000, 64, dtype=torch.bfloat16, device="cuda")
        loss = chunked_cross_entropy(hidden, weight, None, torch.empty(8192, dtype=torch.int64, device="cuda"))
        assert loss.device.type == "cuda" and loss.dtype == torch.float32


def test_chunks_are_bounded_by_their_logits_but_never_thin() -> None:
    assert chunk_rows(2048, 4096, "cpu") == 2048
    assert chunk_rows(100_000, 32_000, "cpu") == 524
    assert chunk_rows(100_000, 256_000, "cpu") == 512
    assert chunk_rows(9, 32_000, "cpu") == 9
    assert chunk_rows(100_000, 32_000, "cuda") == 4194
    assert chunk_rows(100_000, 256_000, "cuda") == 2048
    assert [added_classes(n, "cuda") for n in (32_100, 32_128, 50_257)] == [28, 0, 47]
    assert added_classes(32_100, "cpu") == 0
