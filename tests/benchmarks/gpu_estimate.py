"""One training update as on an H100, estimated without a GPU: the library's own update, on tensors without values.

    python tests/benchmarks/gpu_estimate.py [PROFILE ...] [--set KEY=VALUE] [--micro 16] [--chunk-rows 4096]
        [--arms eager,compiled,full,full-compiled] [--families] [--kernels 12]

eager, compiled              the profile's low-rank stage, without and with torch.compile
full, full-compiled          the same model trained in full by this library
An arm is one update of two micro-steps; the second stands for all that follow the first. An update takes as long as
its kernels one after the other, or as the host takes to launch them, whichever is longer. How kernels are counted, and
how long each takes, stands in gpu_counting.py. Odd sides, which run slower on a real GPU, cost nothing extra here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils import _foreach_utils

sys.path.insert(0, str(Path(__file__).parent))

from gpu_counting import Count, FusedGroups, Kernel

from relora_train.method import fast_path, low_rank, wrap
from relora_train.method.bfloat16_adamw import round_trained_matrices
from relora_train.method.fast_path import HashMasks, share_inputs
from relora_train.method.layer import relora_layers
from relora_train.method.stages import plan_stages
from relora_train.method.wrap import apply_relora
from relora_train.settings.load import load_profile
from relora_train.settings.profile import Profile
from relora_train.training.models import chunked_loss
from relora_train.training.models.compiling import compile_blocks
from relora_train.training.models.model import checkpoint_activations, next_token_loss, round_residual
from relora_train.training.models.registry import objective_of
from relora_train.training.optimizer import build_optimizer
from relora_train.training.step import StageTraining

SECONDS_A_LAUNCH = 7e-6
"""The host's time for one kernel."""

ARMS = ("eager", "compiled", "full", "full-compiled")
CPU = torch.device("cpu")

Kernels = dict[Kernel, float]
"""How often each kernel runs."""


@dataclass(frozen=True)
class Estimate:
    """An update of `micro_steps` micro-steps: the first, all that are like the second, and the end, once."""

    first: Kernels
    other: Kernels
    end: Kernels
    """Clipping and optimizer."""

    micro_steps: int
    micro_tokens: int
    saved_bytes: float
    """The tensors that a forward pass leaves for its backward pass."""

    syncs: float
    graph_breaks: int

    def total(self, of: Callable[[Kernel], float]) -> float:
        """Return the sum of a number over the kernels of the update."""
        first, other, end = (sum(n * of(kernel) for kernel, n in part.items()) for part in self.parts)
        return first + (self.micro_steps - 1) * other + end

    @property
    def parts(self) -> tuple[Kernels, Kernels, Kernels]:
        return self.first, self.other, self.end

    @property
    def launches(self) -> float:
        return self.total(lambda kernel: kernel.launches)

    @property
    def seconds(self) -> float:
        return max(self.total(lambda kernel: kernel.seconds), self.launches * SECONDS_A_LAUNCH)

    @property
    def tokens_per_second(self) -> float:
        return self.micro_steps * self.micro_tokens / self.seconds

    def share(self, bound: str) -> float:
        """Return the share of the kernels' time that this limit binds."""
        bounded = self.total(lambda kernel: kernel.seconds if kernel.bound == bound else 0.0)
        return bounded / self.total(lambda kernel: kernel.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("profiles", nargs="*", default=["llama_1b"])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--micro", type=int, action="append", help="sequences of a micro-step; the profile's if absent")
    parser.add_argument("--chunk-rows", type=int, action="append", help="rows of a chunk of the loss")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--families", action="store_true", help="tell what each arm's time goes to")
    parser.add_argument("--kernels", type=int, default=0, help="list so many kinds of kernels of each arm")
    options = parser.parse_args()
    rows = []
    for name, micro, chunk in itertools.product(
        options.profiles, options.micro or [None], options.chunk_rows or [None]
    ):
        profile = load_profile(name, options.set)
        for arm in options.arms.split(","):
            made = estimate(profile, arm, micro=micro, chunk_rows=chunk)
            tokens = f"{made.micro_tokens // profile.batch.sequence_length}x{profile.batch.sequence_length}"
            rows.append([" ".join(filter(None, [name, tokens, chunk and f"chunk {chunk}", arm])), *cells(made)])
            lines = largest(made, family, 100) if options.families else []
            for line in [*lines, *largest(made, lambda kernel: kernel.name, options.kernels)]:
                sys.stderr.write(f"{line}\n")
    for row in (("a micro-step", *COLUMNS), ("---", *["---:"] * len(COLUMNS)), *rows):
        sys.stdout.write(f"| {' | '.join(row)} |\n")


COLUMNS = (
    "kernels", "GB", "TFLOP", "saved MB/token", "syncs", "breaks", "ms", "tokens/s", "bytes", "FLOPs", "launches",
)  # fmt: skip
"""The last three: shares of the kernels' time by what bounds each. Syncs are those of the whole update."""


def cells(made: Estimate) -> list[str]:
    steps = made.micro_steps
    return [
        f"{made.launches / steps:,.0f}",
        f"{made.total(lambda kernel: kernel.bytes) / steps / 1e9:,.1f}",
        f"{made.total(lambda kernel: kernel.flops) / steps / 1e12:,.1f}",
        f"{made.saved_bytes / made.micro_tokens / 1e6:.2f}",
        f"{made.syncs:.0f}",
        str(made.graph_breaks),
        f"{made.seconds / steps * 1e3:,.1f}",
        f"{made.tokens_per_second:,.0f}",
        *(f"{made.share(bound):.0%}" for bound in ("bytes", "FLOPs", "launches")),
    ]


def family(kernel: Kernel) -> str:
    if "attention" in kernel.name or kernel.name == "addmm's copy":
        return kernel.name.replace("_backward", "")
    if kernel.flops:
        return f"products bound by {kernel.bound}"
    if kernel.name.startswith("fused"):
        return "fused groups, tiny" if kernel.bound == "launches" else "fused groups"
    return "others"


def largest(made: Estimate, kind: Callable[[Kernel], str], kinds: int) -> list[str]:
    """Return the kinds of kernels that take longest in a micro-step."""
    seconds, counts, sizes = Counter[str](), Counter[str](), Counter[str]()
    for kernel, times in made.other.items():
        seconds[kind(kernel)] += times * kernel.seconds
        counts[kind(kernel)] += times * kernel.launches
        sizes[kind(kernel)] += times * kernel.bytes
    return [
        f"{taken * 1e3:8.2f} ms {counts[name]:6.0f} x {sizes[name] / 1e9:8.2f} GB  {name[:150]}"
        for name, taken in seconds.most_common(kinds)
    ]


def estimate(profile: Profile, arm: str, *, micro: int | None = None, chunk_rows: int | None = None) -> Estimate:
    """Return the estimate of one of ARMS. micro: sequences of a micro-step. chunk_rows: rows of a chunk of the loss.

    Blocks are equal: of more than three only two and three are run, and each further one is their difference.
    """
    layers = profile.model.num_hidden_layers
    micro = micro or profile.batch.micro_sequences or profile.batch.sequences
    if layers <= 3:
        return run(profile, arm, micro, chunk_rows)
    few = [profile.model.model_copy(update={"num_hidden_layers": n}) for n in (2, 3)]
    two, three = (run(profile.model_copy(update={"model": model}), arm, micro, chunk_rows) for model in few)

    def grown(small: Any, large: Any) -> Any:
        if isinstance(small, dict):
            return {k: grown(small.get(k, 0), large.get(k, 0)) for k in small | large}
        return small + (layers - 2) * (large - small)

    first, other, end = map(grown, two.parts, three.parts)
    return replace(
        three, first=first, other=other, end=end, syncs=grown(two.syncs, three.syncs),
        saved_bytes=grown(two.saved_bytes, three.saved_bytes),
    )  # fmt: skip


def run(profile: Profile, arm: str, micro: int, chunk_rows: int | None = None) -> Estimate:
    """Run two updates of the library on fake tensors: one to compile and to fill Adam's state, and one to count."""
    micro_steps = max(1, profile.batch.sequences // micro)
    batch = profile.batch.model_copy(update={"sequences": 2 * micro, "micro_sequences": micro})
    profile = profile.model_copy(update={"batch": batch})
    torch._dynamo.reset()
    counters.clear()
    count = Count()
    with as_if_training_on_cuda(chunk_rows), FakeTensorMode(allow_non_fake_inputs=True):
        update = build(profile, count, low_rank_stage=not arm.startswith("full"), compiled=arm.endswith("compiled"))
        watch = update.ranks
        watch.examples = torch.zeros(micro, batch.sequence_length + 1, dtype=torch.int64)
        update.update(update.stage.first_step)
        update.optimizer.zero_grad(set_to_none=True)
        watch.examples = torch.zeros(2 * micro, batch.sequence_length + 1, dtype=torch.int64)
        watch.starts.clear()
        with count:
            update.update(update.stage.first_step)
    return Estimate(
        first=Counter(count.kernels[: watch.starts[1]]),
        other=Counter(count.kernels[watch.starts[1] : watch.end]),
        end=Counter(count.kernels[watch.end :]),
        micro_steps=micro_steps,
        micro_tokens=micro * batch.sequence_length,
        saved_bytes=watch.saved_bytes,
        syncs=sum(count.syncs.values()),
        graph_breaks=sum(counters["graph_break"].values()),
    )


class Watch:
    """The data, loss, masks and ranks that an update meets; they note where its parts begin."""

    rank, world_size, device, sharded = 0, 1, CPU, False

    def __init__(self, count: Count, model: nn.Module, masks: HashMasks | None) -> None:
        self.count, self.model, self.masks = count, model, masks
        self.examples = torch.empty(0)
        self.starts: list[int] = []
        self.end = self.saved_bytes = 0

    def batch(self, position: int, *, last: bool) -> Tensor:
        return self.examples

    def draw(self) -> None:
        self.starts.append(len(self.count.kernels))
        if self.masks is not None:
            self.masks.draw()

    def terms(self, examples: Tensor) -> Tensor:
        count = examples[:, 1:].numel()
        return cast(Any, SimpleNamespace(numpy=lambda: count))  # a number that the CPU knows

    def loss(self, examples: Tensor) -> Tensor:
        before = self.count.held_bytes()
        loss = next_token_loss(self.model, examples)
        self.saved_bytes = self.count.held_bytes() - before
        return loss

    @contextmanager
    def during(self) -> Iterator[None]:
        """Stand for the sum of gradients, which ends with the last backward pass."""
        yield
        self.end = len(self.count.kernels)

    def sum(self, values: Tensor) -> Tensor:
        return values


def build(profile: Profile, count: Count, *, low_rank_stage: bool, compiled: bool) -> Any:
    """Return a stage as training/build.py makes it, around a model without values."""
    stage = next(stage for stage in plan_stages(profile) if stage.low_rank == low_rank_stage)
    objective = objective_of(profile)
    with unset_fake_temporarily(), torch.device("meta"):
        model = objective.new_model(cast(Any, SimpleNamespace(vocab_size=32_100, eos_id=0)))
        if low_rank_stage:
            relora = profile.relora
            apply_relora(
                model, rank=relora.rank, alpha=relora.alpha, dropout=relora.dropout,
                target_modules=relora.target_modules, rank_stabilized=relora.rank_stabilized, seed=0,
            )  # fmt: skip
    give_memory(model)
    if low_rank_stage and profile.precision.computes_in_bfloat16:
        for _, layer in relora_layers(model):
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
    if compiled:
        compile_blocks(model, recompute=profile.launch.recompute_elementwise, backend=FusedGroups(count))
    objective.prepare_for_training(model)
    if profile.precision.trains_in_bfloat16:
        round_trained_matrices(model)
    model.train()
    if profile.precision.residual == "bfloat16":
        round_residual(objective.stem(model))
    if profile.launch.gradient_checkpointing:
        checkpoint_activations(model)
    optimizer = build_optimizer(model, profile.optimizer)
    masks = None
    if low_rank_stage and profile.relora.dropout > 0:
        masks = HashMasks(model)  # also eagerly: low_rank.py then looks for no number in a tensor
    if low_rank_stage and not compiled:
        share_inputs(model, optimizer=optimizer)
    watch: Any = Watch(count, model, masks if compiled else None)
    return StageTraining(
        request=cast(Any, SimpleNamespace(profile=profile)), stage=stage, ranks=watch, objective=objective, model=model,
        loss_function=watch, optimizer=optimizer, train_data=watch, batches=watch, val_data=watch,
        start=cast(Any, SimpleNamespace(samples_seen=0, step=stage.start_step)), masters=None, masks=watch, products={},
        gradient_sum=watch,
    )  # fmt: skip


def give_memory(model: nn.Module) -> None:
    """Replace tensors of the meta device by those of the fake mode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def as_if_training_on_cuda(chunk_rows: int | None) -> Iterator[None]:
    """Let the library, on fake tensors of the CPU, choose what it chooses on CUDA."""
    rows_of, added_to, kept = chunked_loss.chunk_rows, chunked_loss.added_classes, low_rank._kept
    products_of = fast_path.choose_products

    def rows_on_cuda(rows: int, classes: int, device: str) -> int:
        return min(rows, chunk_rows) if chunk_rows else rows_of(rows, classes, "cuda")

    def kept_on_cuda(rows: Tensor, dropout: float, seed: Any) -> Tensor | None:
        return torch.empty_like(rows).bernoulli_(1 - dropout) if dropout else kept(rows, dropout, seed)

    with ExitStack() as stack:
        for holder, name, value in (
            (chunked_loss, "chunk_rows", rows_on_cuda),
            (chunked_loss, "added_classes", lambda classes, device: added_to(classes, "cuda")),
            (fast_path, "choose_products", lambda *shape, device, **rest: products_of(*shape, device="cuda", **rest)),
            (low_rank, "_kept", kept_on_cuda),
            (wrap, "reinit", lambda *_, **__: None),
            (F, "scaled_dot_product_attention", flash_attention),
            (_foreach_utils, "_foreach_supported_types", [Tensor, FakeTensor]),
        ):
            stack.enter_context(mock.patch.object(holder, name, value))
        yield


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attend by the kernel that torch picks on CUDA, with autocast's casts."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return cast(Tensor, attend(query, key, value, dropout_p, is_causal, False, scale=scale)[0])


if __name__ == "__main__":
    main()
