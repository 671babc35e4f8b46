"""B3, B4, B6, B7 and B11: parts of a step by themselves."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import speed
import torch
from check_run import Run
from right_numbers import exact_cross_entropy, loss_inputs
from stages import release, shape_request, shape_stage, stop_sharing
from timing import kernels_of, peak_gb, timed
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.method.graph_path import hash_mask
from relora_train.training.models import chunked_loss


def drawn(run: Run, *shape: int) -> Tensor:
    return torch.randn(*shape, device=run.device, dtype=torch.bfloat16)


# --- B3


def odd_shapes(run: Run) -> None:
    """llama_1b's MLP and head as they are, and padded."""
    rows = 64 if run.dry else 8192
    for sides in ((5461, 5464, 5504), (32_100, 32_104, 32_128)):
        speeds: dict[str, dict[int, float]] = {}
        for side in sides:
            out, into = (side, 2048) if not run.dry else (side // 100, 32)
            x, weight, gradient = drawn(run, rows, into), drawn(run, out, into), drawn(run, rows, out)
            inner = drawn(run, into, out)
            products: dict[str, Callable[[], Tensor]] = {
                "x W.T": lambda x=x, w=weight: x @ w.T,
                "g W": lambda g=gradient, w=weight: g @ w,
                "g.T x": lambda g=gradient, x=x: g.T @ x,
                "as the inner side": lambda g=gradient, w=inner: g @ w.T,
            }
            for name, product in products.items():
                seconds = timed(run, product, steps=20).seconds
                speeds.setdefault(name, {})[side] = 2 * rows * out * into / seconds / 1e12
        run.record(**{f"TF/s, 2048 x {sides}": speeds})
        for name, of_sides in speeds.items():
            gain = max(of_sides[side] for side in sides[1:]) / of_sides[sides[0]]
            run.expect(f"{name}: {sides[0]} padded is {gain:.2f} times as fast", gain <= 1.15)


# --- B4


def loss_heads(run: Run) -> None:
    rows, width = (96, 64) if run.dry else (8192, 2048)
    for classes in (300,) if run.dry else (32_100, 128_256):
        hidden, weight, answers = loss_inputs(rows, classes, width, 5.5, 0.0, run.device)
        exact = exact_cross_entropy(hidden, weight, answers)[0]
        hidden.requires_grad_()
        weight.requires_grad_()
        found: dict[str, dict[str, Any]] = {}
        for name, head in heads(rows).items():
            try:
                found[name] = measured_head(run, head, hidden, weight, answers, exact)
            except Exception as error:  # one that is missing, or runs out of memory
                found[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            hidden.grad = weight.grad = None
            release(run)
        run.record(**{f"{rows} x {classes}": found})
        right = {name: each["ms"] for name, each in found.items() if each.get("error of loss", 1) < 1e-3}
        fastest = min(right, key=lambda name: right[name], default="none")
        run.expect(f"{classes} classes: {fastest} is the fastest: {right.get(fastest)} ms", fastest.startswith("ours"))


def measured_head(
    run: Run, head: Callable[..., Tensor], hidden: Tensor, weight: Tensor, answers: Tensor, exact: float
) -> dict[str, Any]:
    def both() -> Tensor:
        loss = head(hidden, weight, answers)
        loss.backward()
        return loss.detach()

    release(run)
    seconds = timed(run, both).seconds
    return {"ms": 1000 * seconds, "peak_gb": peak_gb(run), "error of loss": abs(float(both()) - exact) / exact}


def heads(rows: int) -> dict[str, Callable[..., Tensor]]:
    def ours(chunk: int | None) -> Callable[..., Tensor]:
        def head(hidden: Tensor, weight: Tensor, answers: Tensor) -> Tensor:
            if chunk is None:
                return chunked_loss.chunked_cross_entropy(hidden, weight, None, answers)
            with mock.patch.object(chunked_loss, "chunk_rows", lambda *sizes: min(chunk, rows)):
                return chunked_loss.chunked_cross_entropy(hidden, weight, None, answers)

        return head

    def plain(hidden: Tensor, weight: Tensor, answers: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), answers, reduction="sum")

    def torchs(policy: str) -> Callable[..., Tensor]:
        def head(hidden: Tensor, weight: Tensor, answers: Tensor) -> Tensor:
            options = nn.LinearCrossEntropyOptions(acc_policy=policy)
            return F.linear_cross_entropy(hidden, weight, answers, reduction="sum", options=options)

        return head

    found = {"ours as chosen": ours(None)} | {f"ours, {chunk} rows": ours(chunk) for chunk in (512, 2048, 8192)}
    found |= {"unchunked": plain, "torch's, accurate": torchs("accurate"), "torch's, auto": torchs("auto")}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger's"] = lambda hidden, weight, answers: liger(weight, hidden, answers)
    return found


# --- B6


def dropout(run: Run) -> None:
    """The price of 0.1: of a mask by itself, of its generator, and as B1 measured whole steps."""
    rows, width = (64, 32) if run.dry else (8192, 2048)
    x = drawn(run, rows, width)
    generator = torch.Generator(run.device).manual_seed(0)
    out, seed = torch.empty_like(x), torch.tensor([5, 7], dtype=torch.int32, device=run.device)
    timings = {
        "bernoulli_": lambda: out.bernoulli_(0.9, generator=generator),
        "torch's dropout": lambda: F.dropout(x, 0.1),
        "a product with the mask": lambda: x * out,
        "a hashed mask, eager": lambda: hash_mask(x, seed, 0.1),
    }
    for name, step in timings.items():
        run.record(**{name: timed(run, step, steps=20).as_record()})
    started, calls = time.perf_counter(), 200
    for number in range(calls):
        torch.Generator(run.device).manual_seed(number)
    run.record(**{"host_us of a generator": 1e6 * (time.perf_counter() - started) / calls})
    rows_of_b1 = [speed.MEASURED.get(replace(speed.BILLION, dropout=p).name, {}) for p in (0.1, 0.0)]
    if all("tokens_per_second" in row for row in rows_of_b1):
        run.record(
            **{"steps without over with": rows_of_b1[1]["tokens_per_second"] / rows_of_b1[0]["tokens_per_second"]}
        )
    else:
        run.record(**{"steps without over with": "not known: B1 was not run in this process"})


# --- B7


def attention(run: Run) -> None:
    """The attention of one block, as this library calls it."""
    for deterministic in (True, False):
        request = shape_request(
            run, "llama_1b", model__num_hidden_layers=2, launch__compile=False, precision__deterministic=deterministic
        )
        training = shape_stage(run, request)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        config = training.model.config
        run.record(**{"implementation": config._attn_implementation})
        kernels = kernels_of(run, lambda t=training: t.update(t.stage.first_step))
        found = [name for name, _, _ in kernels.by_name]
        forward, both = attention_of(training.model, run)
        timing = timed(run, both)
        run.record(**{f"attention forward and backward, deterministic {deterministic}": timing.as_record()})
        chosen = [name for name in found if any(word in name.lower() for word in ("flash", "fmha", "cudnn", "sdpa"))]
        run.record(**{f"kernels, deterministic {deterministic}": chosen[:10]})
        run.expect(f"deterministic {deterministic}: flash or the like among {found[:5]}", bool(chosen))
        if deterministic:
            inside = kernels_of(run, forward).by_name
            run.record(**{"kernels of its forward pass": inside[:25]})
            copies = [name for name, _, _ in inside if "copy" in name.lower()]
            run.expect(f"K and V are not copied: {copies[:3]}", not copies)


def attention_of(model: Any, run: Run) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """Return calls of the function that the model attends by, on q, k and v of its shape: forward, and both ways."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config, module = model.config, model.model.layers[0].self_attn
    size, heads = config.hidden_size // config.num_attention_heads, config.num_attention_heads
    batch, length = (2, 16) if run.dry else (16, 512)
    q, k, v = (drawn(run, batch, length, heads, size).transpose(1, 2).detach().requires_grad_() for _ in range(3))
    gradient = drawn(run, batch, length, heads, size)

    def forward() -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
        return attend(module, q, k, v, None, dropout=0.0, scaling=module.scaling)[0]

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), gradient)

    return forward, both


# --- B11


def float32(run: Run) -> None:
    """The chosen order of products beside the reference, with and without TF32."""
    for precision in ("highest",) if run.dry else ("highest", "high"):
        speeds = {}
        for kind in ("chosen", "reference"):
            release(run)
            request = shape_request(
                run,
                "llama_350m",
                relora__dropout=0.0,
                launch__compile=False,
                precision__dtype="float32",
                precision__matmul_precision=precision,
                batch__micro_sequences=16,
            )
            training = shape_stage(run, request)
            products = sorted(set(training.products.values()))
            if kind == "reference":
                stop_sharing(training.model)
            timing = timed(run, speed.stepper(training))
            speeds[kind] = request.profile.batch.tokens / timing.seconds
            run.record(**{f"{precision}, {kind}": {"tokens_per_second": speeds[kind], **timing.as_record()}})
            del training
        ratio = speeds["chosen"] / speeds["reference"]
        run.record(**{f"products, {precision}": products, f"gain, {precision}": ratio})
        run.expect(f"{precision}: the chosen order {products} is {ratio:.2f} times as fast as the reference", ratio > 1)
