"""The estimate of an update on a GPU counts what the library does: FLOPs by closed forms, and no byte for free."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import COMPILER_WARNINGS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from relora_train.settings.load import load_profile
from relora_train.settings.profile import Profile
from relora_train.training.models.model import blocks

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import gpu_estimate
from gpu_counting import Count, FusedGroups, Kernel, UnknownCostError
from gpu_estimate import Estimate, Kernels, estimate, run

pytestmark = COMPILER_WARNINGS

H, FF, LAYERS, HEADS, V, RANK, SEQ, MICRO = 64, 176, 2, 2, 320, 8, 32, 4
N = MICRO * SEQ
SIDES = {"q": (H, H), "k": (H, H), "v": (H, H), "o": (H, H), "gate": (H, FF), "up": (H, FF), "down": (FF, H)}


def profile(**overrides: Any) -> Profile:
    shape = {
        "model.hidden_size": H, "model.intermediate_size": FF, "model.num_hidden_layers": LAYERS,
        "model.num_attention_heads": HEADS, "model.vocab_size": V, "relora.rank": RANK, "relora.dropout": 0.1,
        "batch.sequence_length": SEQ, "batch.sequences": 5 * MICRO, "batch.micro_sequences": MICRO,
    }  # fmt: skip
    return load_profile("llama_130m", shape | {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.fixture(scope="module")
def made() -> dict[str, Estimate]:
    return {arm: estimate(profile(), arm) for arm in ("eager", "full", "compiled")}


def of(kernels: Kernels, number: str) -> float:
    return sum(times * getattr(kernel, number) for kernel, times in kernels.items())


def calls(kernels: Kernels, name: str) -> float:
    return sum(times for kernel, times in kernels.items() if kernel.name == name)


def counted(run: Callable[..., Any], *inputs: Tensor) -> list[Kernel]:
    """Return the kernels of a function of these inputs."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        given = [fake.from_tensor(tensor) for tensor in inputs]
        with Count() as count:
            run(*given)
    return count.kernels


# --- one update


def outside_the_layers() -> int:
    """FLOPs of causal attention, whose backward pass makes its scores again, and of the head."""
    return LAYERS * 7 * N * SEQ * H + 6 * N * V * H


def test_flops_are_those_of_the_closed_forms(made: dict[str, Estimate]):
    weights, sides = sum(i * o for i, o in SIDES.values()), sum(i + o for i, o in SIDES.values())
    expected = {
        "full": 6 * N * weights,
        "compiled": 4 * N * weights + 6 * N * RANK * sides,
        # Ax is made again for the gradient of B.
        "eager": 4 * N * weights + 6 * N * RANK * sides + 2 * N * RANK * sum(i for i, _ in SIDES.values()),
    }
    for arm, flops in expected.items():
        assert of(made[arm].other, "flops") == LAYERS * flops + outside_the_layers(), arm


def test_an_update_is_its_micro_steps_and_one_end(made: dict[str, Estimate]):
    each = made["eager"]
    assert each.total(lambda kernel: kernel.flops) == 5 * of(each.other, "flops") and each.micro_steps == 5
    assert {kernel.name for kernel in each.end} > {"_fused_adamw_", "_foreach_norm"}
    assert calls(each.first, "add_") < calls(each.other, "add_")  # gradients are added to those that are there
    assert each.seconds >= each.launches * gpu_estimate.SECONDS_A_LAUNCH


def test_further_blocks_are_the_difference_of_two_and_three():
    deep = profile(model__num_hidden_layers=4)
    drawn, whole = estimate(deep, "eager"), run(deep, "eager", MICRO)
    for few, all_of_them in zip(drawn.parts, whole.parts, strict=True):
        for number in ("bytes", "flops"):
            assert of(few, number) == of(all_of_them, number)
    assert drawn.other == whole.other and drawn.saved_bytes == whole.saved_bytes


def test_the_host_waits_for_nothing_and_compiled_blocks_have_no_breaks(made: dict[str, Estimate]):
    assert {(each.syncs, each.graph_breaks) for each in made.values()} == {(0, 0)}


def test_compiled_blocks_take_fewer_kernels_and_bytes_and_save_less(made: dict[str, Estimate]):
    eager, compiled = made["eager"], made["compiled"]
    assert compiled.launches < eager.launches
    assert compiled.saved_bytes < eager.saved_bytes
    assert compiled.total(lambda kernel: kernel.bytes) < eager.total(lambda kernel: kernel.bytes)


def test_compiled_siblings_share_products_and_low_rank_outputs_cost_none(made: dict[str, Estimate]):
    """A product a weight and a pass, two thin ones a weight, three an input that layers read; three for the loss."""
    inputs, layers = 4, len(SIDES)
    products = sum(calls(made["compiled"].other, name) for name in ("mm", "addmm"))
    assert products == LAYERS * (2 * layers + 2 * layers + 3 * inputs) + 3
    assert calls(made["compiled"].other, "_log_softmax") == 0 < calls(made["eager"].other, "_log_softmax")


def test_one_more_multiplication_costs_exactly_its_bytes(made: dict[str, Estimate], monkeypatch: pytest.MonkeyPatch):
    build = gpu_estimate.build

    def with_hook(*given: Any, **settings: Any) -> Any:
        training = build(*given, **settings)
        blocks(training.model)[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
        return training

    monkeypatch.setattr(gpu_estimate, "build", with_hook)
    more = estimate(profile(), "eager")
    for before, after in zip(made["eager"].parts[:2], more.parts[:2], strict=True):
        # float32, read and written, forward and backward
        assert of(after, "bytes") - of(before, "bytes") == 2 * 2 * N * H * 4
        assert of(after, "launches") - of(before, "launches") == 2


def test_checkpointing_saves_one_input_a_block(made: dict[str, Estimate]):
    head = H * V * 2 + N * H * 2  # gradients that are made with the loss
    checkpointed = estimate(profile(launch__gradient_checkpointing=True), "eager")
    assert N * H * 4 * LAYERS + head < checkpointed.saved_bytes < N * H * 4 * (LAYERS + 5) + head
    assert checkpointed.saved_bytes < made["eager"].saved_bytes / 2
    assert of(checkpointed.other, "flops") > 1.2 * of(made["eager"].other, "flops")


# --- the rules


def test_views_and_allocations_are_free_and_a_change_in_place_counts_twice():
    x, size = torch.zeros(8, 16), 8 * 16 * 4
    assert not counted(lambda x: (x.view(16, 8).t()[:3], x.expand(2, 8, 16), torch.empty_like(x)), x)
    assert [kernel.bytes for kernel in counted(lambda x: x * 2, x)] == [2 * size]
    assert [kernel.bytes for kernel in counted(lambda x: x.mul_(2), x)] == [2 * size]
    assert [kernel.bytes for kernel in counted(lambda x: x.fill_(2), x)] == [size]
    assert [kernel.bytes for kernel in counted(lambda x: x + x[:1].expand(8, 16), x)] == [3 * size]
    assert [kernel.bytes for kernel in counted(lambda x, row: x + row.expand(8, 16), x, x[0].clone())] == [
        2 * size + 64
    ]


def test_adding_to_a_whole_matrix_copies_it_unless_in_place():
    y, a, b = torch.zeros(8, 16), torch.zeros(8, 4), torch.zeros(4, 16)
    kernels = counted(torch.addmm, y, a, b)
    assert [kernel.bytes for kernel in kernels] == [2 * 512, 512 + 128 + 256 + 512]
    assert [kernel.flops for kernel in kernels] == [0, 2 * 8 * 4 * 16]
    assert len(counted(torch.addmm, y[0].clone(), a, b)) == 1
    assert len(counted(lambda y, a, b: y.addmm_(a, b), y, a, b)) == 1


def test_a_number_for_the_host_is_a_sync():
    with FakeTensorMode(), Count() as count:
        torch.zeros(3).sum().item()
    assert sum(count.syncs.values()) == 1


@torch.library.custom_op("gpu_estimate_tests::squares", mutates_args=())
def squares(x: Tensor) -> Tensor:
    return (x @ x) * 2


@squares.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_opaque_operation_is_charged_what_it_does():
    x = torch.zeros(32, 32)
    within, opaque = counted(lambda x: (x @ x) * 2, x), counted(squares, x)
    assert opaque == within
    assert sum(kernel.flops for kernel in opaque) == 2 * 32**3
    torch._dynamo.reset()
    groups = FusedGroups(Count())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        torch.compile(lambda x: squares(x + 1) + 1, backend=groups)(fake.from_tensor(x))
    (graph,) = groups.graphs
    assert [kernel for kernel in graph if not kernel.name.startswith("fused")] == within
    assert [kernel.bytes for kernel in graph if kernel.name.startswith("fused")] == [2 * 4096, 2 * 4096]


def test_an_operation_that_nobody_can_look_into_is_refused():
    with torch.library._scoped_library("gpu_estimate_tests", "FRAGMENT") as library:
        library.define("unknown(Tensor x) -> Tensor")
        library.impl("unknown", lambda x: x.clone(), "CompositeExplicitAutograd")
        with pytest.raises(UnknownCostError, match="unknown"):
            counted(torch.ops.gpu_estimate_tests.unknown, torch.zeros(2))
