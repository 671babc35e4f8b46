"""A3 and A4: the low-rank autograd function beside its reference, and a step that waits for nothing."""

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from check_run import Run
from right_numbers import relative
from stage_runs import ignore
from stages import tiny_request, tiny_stage
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from relora_train.method.graph_path import hash_mask, linears_in_graph, low_rank_scale
from relora_train.method.layer import relora_layers, relora_linear
from relora_train.method.low_rank import Factors, low_rank_linears
from relora_train.training.step import StageTraining
from relora_train.training.trainer import run_stage

P = 0.1
SCALING = 0.25
SEED = 1234


# --- A3


@dataclass
class Case:
    """An input, layers that read it, and what comes back to their outputs."""

    x: Tensor
    layers: list[Factors]
    gradients: list[Tensor]

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, *(t for layer in self.layers for t in (layer.A, layer.B))]


def case_of(run: Run, dtype: torch.dtype, *, autocast: bool) -> Case:
    """Return q, k and v of (rows, in) -> (rows, out), their gradients transposed in memory as attention's are."""
    rows, width, outs, rank = (64, 48, (48, 24, 24), 8) if run.dry else (4096, 1024, (1024, 256, 256), 128)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(run.device, dtype)

    x = draw(rows, width).requires_grad_()
    weight_dtype = torch.bfloat16 if autocast else dtype
    layers = [
        Factors(
            draw(out, width, scale=width**-0.5).to(weight_dtype),
            None,
            draw(rank, width, scale=width**-0.5).requires_grad_(),
            draw(out, rank, scale=0.3).requires_grad_(),
        )
        for out in outs
    ]
    return Case(x, layers, [draw(out, rows).T for out in outs])


KINDS: dict[str, tuple[torch.dtype, bool, float]] = {
    "float32": (torch.float32, False, 1e-5),
    "bfloat16": (torch.float32, True, 2e-2),
}
"""Dtype of the input, autocast, largest error."""


def fast_path(run: Run) -> None:
    for name, (dtype, autocast, limit) in KINDS.items():
        case = case_of(run, dtype, autocast=autocast)
        for dropout, seed in ((0.0, None), (P, None), (P, hash_seed(run.device))):
            kind = f"{name}, dropout {dropout}{' by hash' if seed is not None else ''}"
            compare_with_reference(run, kind, case, autocast, dropout, limit, seed)
    for seed in (None, hash_seed(run.device)):
        mask_is_the_same_both_ways(run, seed)
        share_is_right(run, seed)
    hash_is_the_same_everywhere(run)
    inside_checkpoints(run)
    nothing_waits(run)


def hash_seed(device: torch.device) -> Tensor:
    return torch.tensor([1_234_567_891, -987_654_321], dtype=torch.int32, device=device)


def compare_with_reference(
    run: Run, name: str, case: Case, autocast: bool, dropout: float, limit: float, seed: Tensor | None
) -> None:
    kept = mask_of(case, dropout, seed) if dropout else torch.ones_like(case.x)

    def ours() -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)
        return low_rank_linears(case.x, case.layers, "split", SCALING, dropout, seed)

    def in_a_graph() -> tuple[Tensor, ...]:
        layers = [(f.weight, None, f.A, f.B) for f in case.layers]
        return tuple(linears_in_graph(case.x, layers, low_rank_scale(SCALING, dropout), seed, dropout))

    def reference() -> tuple[Tensor, ...]:
        made = []
        for f in case.layers:
            no_weight, no_update = torch.zeros_like(f.weight), torch.zeros_like(f.A)
            thin = relora_linear(case.x * kept, no_weight, None, f.A, f.B, SCALING, 0.0)
            made.append(thin + relora_linear(case.x, f.weight, None, no_update, f.B, SCALING, 0.0))
        return tuple(made)

    exact = outputs_and_gradients(run, case, reference, autocast)
    functions = {"fast path": ours} | ({"graph's operations": in_a_graph} if dropout == 0 or seed is not None else {})
    for which, function in functions.items():
        found = outputs_and_gradients(run, case, function, autocast)
        run.require(f"{which}, {name}: dtype of outputs {found[0].dtype}", found[0].dtype == exact[0].dtype)
        worst = max(relative(a, b) for a, b in zip(found, exact, strict=True))
        run.below(f"error of the {which}, {name}", worst, limit)


def outputs_and_gradients(
    run: Run, case: Case, function: Callable[[], tuple[Tensor, ...]], autocast: bool
) -> list[Tensor]:
    with torch.autocast(run.device_type, dtype=torch.bfloat16, enabled=autocast):
        outputs = function()
    gradients = [g.to(y.dtype) for g, y in zip(case.gradients, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, case.inputs, gradients)]


def mask_of(case: Case, dropout: float, seed: Tensor | None) -> Tensor:
    """Return the mask of the next draw under SEED, rescaled: a layer of x = 1, W = 0, A = B = 1 gives nothing else."""
    width = case.x.shape[-1]
    eye = torch.eye(width, device=case.x.device, dtype=torch.float32)
    probe = Factors(torch.zeros_like(eye), None, eye, eye)
    torch.manual_seed(SEED)
    with torch.no_grad():
        ones = torch.ones_like(case.x, dtype=torch.float32)
        (made,) = low_rank_linears(ones, [probe], "split", 1.0, dropout, seed)
    return made.to(case.x.dtype)


def hash_is_the_same_everywhere(run: Run) -> None:
    rows = 100 if run.dry else 8192
    for width in (64, 2048):
        masks = [
            hash_mask(torch.empty(rows, width, device=device), hash_seed(device), P).cpu()
            for device in (torch.device("cpu"), run.device)
        ]
        run.require(f"hashed masks of {rows} x {width} are a CPU's", torch.equal(*masks))


def mask_is_the_same_both_ways(run: Run, seed: Tensor | None) -> None:
    """In float64 a directional derivative is the difference quotient, or the backward pass has drawn another mask."""
    case = case_of(run, torch.float64, autocast=False)

    def value(x: Tensor, layers: list[Factors]) -> Tensor:
        torch.manual_seed(SEED)
        outputs = low_rank_linears(x, layers, "split", SCALING, P, seed)
        return sum(
            ((y.tanh() * g).sum() for y, g in zip(outputs, case.gradients, strict=True)),
            torch.zeros((), device=x.device, dtype=x.dtype),
        )

    directions = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype).to(t.device)
        for t in case.inputs
    ]
    gradients = torch.autograd.grad(value(case.x, case.layers), case.inputs)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (step, -step):
            x, *factors = [t + sign * d for t, d in zip(case.inputs, directions, strict=True)]
            layers = [replace(f, A=factors[2 * i], B=factors[2 * i + 1]) for i, f in enumerate(case.layers)]
            values.append(float(value(x, layers)))
    quotient = (values[0] - values[1]) / (2 * step)
    run.below(f"derivative against its quotient, {kind_of(seed)}", abs(slope - quotient) / abs(quotient), 1e-6)


def kind_of(seed: Tensor | None) -> str:
    return "stream" if seed is None else "hash"


def share_is_right(run: Run, seed: Tensor | None) -> None:
    case = case_of(run, torch.float32, autocast=False)
    for p in (0.01, P, 0.5):
        made = mask_of(case, p, seed)
        sigma = (p * (1 - p) / made.numel()) ** 0.5
        share = float((made == 0).double().mean())
        run.record(**{f"share dropped of {p}, {kind_of(seed)}": {"share": share, "sigmas off": (share - p) / sigma}})
        # 1 / 131,072: a mask has a share of 65,536ths.
        run.require(f"share {share} of {p}, {kind_of(seed)}", abs(share - p) < 4 * sigma + 1 / 131_072)


def inside_checkpoints(run: Run) -> None:
    case = case_of(run, torch.float32, autocast=False)

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        return low_rank_linears(x, case.layers, "split", SCALING, P)

    def gradients(function: Callable[[Tensor], Any]) -> list[Tensor]:
        torch.manual_seed(SEED)
        return list(torch.autograd.grad(function(case.x), case.inputs, case.gradients))

    plain = gradients(outputs)
    for preserve in (True, False):
        found = gradients(lambda x, p=preserve: checkpoint(outputs, x, use_reentrant=False, preserve_rng_state=p))
        same = all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
        run.record(**{f"same bits in a checkpoint, preserve_rng_state={preserve}": same})
        if preserve:
            run.require("a checkpoint changes no bit", same)


def nothing_waits(run: Run) -> None:
    """After an update no layer keeps an output that nobody asked for."""
    training = tiny_stage(run, "cycle-1", relora={"dropout": P})
    training.update(training.stage.first_step)
    kept = [name for name, layer in relora_layers(training.model) if getattr(layer.shared, "_waiting", None)]
    run.require(f"outputs left behind by {kept[:3]}", not kept)


# --- A4

STEPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": {"dtype": "bfloat16"}},
    "pure-bfloat16": {"precision": {"dtype": "pure-bfloat16"}},
    "checkpointing": {"launch": {"gradient_checkpointing": True}},
    "micro-steps": {"batch": {"micro_sequences": 2}},
    "no clipping": {"optimizer": {"max_grad_norm": None}},
    "hashed masks": {"relora": {"dropout": P, "dropout_mask": "hash"}},
    "no dropout": {"relora": {"dropout": 0.0}},
}
WATCHED = 20
FIRST_WATCHED = 12
"""Updates of a stage: the first ones are recorded one by one, and the tenth is looked at once."""


def no_sync(run: Run) -> None:
    for name, sections in STEPS.items():
        for stage in ("warm-start", "cycle-1"):
            training = tiny_stage(run, stage, **{"relora": {"dropout": P}} | sections)
            first = training.stage.first_step
            for step in (first, first + 1):
                training.update(step)
            with watched(run) as stacks:
                training.update(first + 2)
            judge(run, f"{name}, {stage}", stacks)
    whole_loop(run)


def whole_loop(run: Run) -> None:
    """Twenty iterations of the trainer's loop without a record, by the trainer itself."""
    update, stacks = StageTraining.update, list[str]()
    schedule = {"warm_start_steps": FIRST_WATCHED + WATCHED + 2}
    request = tiny_request(run, "warm-start", "loop", schedule=schedule, logging={"every_steps": 1000})
    watching = watched(run, stacks)

    def watched_update(training: StageTraining, step: int) -> Any:
        if step == FIRST_WATCHED:
            watching.__enter__()
        if step == FIRST_WATCHED + WATCHED:
            watching.__exit__(None, None, None)
        return update(training, step)

    with mock.patch.object(StageTraining, "update", watched_update):
        run_stage(request, ignore)
    judge(run, f"{WATCHED} iterations of the loop", stacks)


@contextmanager
def watched(run: Run, stacks: list[str] | None = None) -> Iterator[list[str]]:
    """Collect the stacks in which torch is made to wait for the device."""
    found: list[str] = [] if stacks is None else stacks

    def note(message: Any, *details: Any, **more: Any) -> None:
        if "synchron" in str(message):
            own = [line for line in traceback.format_stack()[:-1] if "warnings.py" not in line]
            found.append("".join(own[-8:]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if run.device_type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if run.device_type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def judge(run: Run, name: str, stacks: list[str]) -> None:
    distinct = sorted(set(stacks))
    run.record(**{f"waits, {name}": {"count": len(stacks), "stacks": distinct[:5]}})
    run.require(f"{name}: waits {len(stacks)} times", not stacks, device_only=True)
