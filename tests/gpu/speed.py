"""B1, B2, B12, B13 and B1 again: whole training steps of the shipped profiles' shapes."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from check_run import Run
from stages import release, shape_request, shape_stage, updates_of
from timing import CLASSES, Timing, kernels_of, peak_gb, timed

from relora_train.experiments.bench import RELORA, StepRequest, step_requests
from relora_train.runs.plan import plan
from relora_train.training.step import StageTraining

PEAK_FLOPS = 989e12
"""An H100's in bfloat16; another card's shares are of that too."""

FULL_GOAL, LOW_RANK_GOAL = 52_000, 66_000
LARGE = 40e9
"""Bytes of a GPU that takes a step of llama_1b with 8,192 tokens, at either rank."""

STEP_PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "step.py"


@dataclass(frozen=True)
class Row:
    """A training step to measure."""

    profile: str = "llama_1b"
    sequences: int = 16
    low_rank: bool = True
    dropout: float = 0.1
    compiled: bool = False
    deterministic: bool = True
    rounded: bool = False
    """Residual stream in bfloat16."""

    hashed: bool = False
    """Masks of the kind that a compiled run has, in an eager one."""

    @property
    def name(self) -> str:
        rank = f"low rank, dropout {self.dropout}" if self.low_rank else "full rank"
        how = "compiled" if self.compiled else "eager"
        more = (
            ", hashed masks" * self.hashed
            + ", bfloat16 residual" * self.rounded
            + ", any kernels" * (not self.deterministic)
        )
        return f"{self.profile} {self.sequences}x512, {rank}, {how}{more}"

    def request(self, run: Run) -> StepRequest:
        return shape_request(
            run,
            self.profile,
            low_rank=self.low_rank,
            batch__micro_sequences=self.sequences,
            relora__dropout=self.dropout,
            launch__compile=self.compiled,
            precision__deterministic=self.deterministic,
            precision__residual="bfloat16" if self.rounded else "float32",
            relora__dropout_mask="hash" if self.hashed else "auto",
        )


BILLION = Row()
FULL = replace(BILLION, low_rank=False)
ROWS = (
    BILLION,
    replace(BILLION, compiled=True),
    replace(FULL, compiled=True),
    FULL,
    replace(BILLION, compiled=True, rounded=True),
    replace(BILLION, dropout=0.0),
    replace(BILLION, compiled=True, deterministic=False),
    replace(BILLION, hashed=True),
    replace(BILLION, sequences=32, compiled=True),
    replace(BILLION, sequences=32),
    replace(FULL, sequences=32),
    *(replace(row, profile="llama_350m") for row in (replace(BILLION, compiled=True), BILLION, FULL)),
    replace(BILLION, profile="llama_350m", dropout=0.0),
)
"""The rows that decide most come first: a check that is stopped keeps what it has measured."""

MEASURED: dict[str, dict[str, Any]] = {}
"""Rows that this process has measured, for later checks."""


def profiles(run: Run) -> None:
    rows = (BILLION, replace(BILLION, compiled=True), FULL) if run.dry else ROWS
    for row in rows:
        MEASURED[row.name] = measured_row(run, row)
        run.record(**{row.name: MEASURED[row.name]})
    for goal, rank in ((FULL_GOAL, False), (LOW_RANK_GOAL, True)):
        speeds = [
            MEASURED[row.name].get("tokens_per_second", 0.0)
            for row in rows
            if row.profile == "llama_1b" and row.low_rank is rank
        ]
        what = "low rank" if rank else "full rank"
        run.expect(f"llama_1b, {what}: {max(speeds):,.0f} tokens a second, {goal:,} wanted", max(speeds) >= goal)


def again(run: Run) -> None:
    """Rows that decide most once more, with more steps: clocks sink as a card grows warm."""
    for row in (BILLION,) if run.dry else (BILLION, replace(BILLION, compiled=True)):
        run.record(**{row.name: measured_row(run, row, steps=40)})


def measured_row(run: Run, row: Row, *, steps: int = 10) -> dict[str, Any]:
    """Return what a row's step takes; a row that cannot run is a finding, and the others go on."""
    release(run)
    started = time.perf_counter()
    try:
        training = shape_stage(run, request := row.request(run))
        build_seconds = time.perf_counter() - started
        release(run)  # the peak of building is not the step's
        step = stepper(training)
        timing = timed(run, step, steps=steps)
        found = {"build_s": build_seconds, **speed_of(run, request, timing), "peak_gb": peak_gb(run)}
        try:
            kernels = kernels_of(run, step)
            found |= {
                "kernels": kernels.count,
                "busy_ms": kernels.busy_ms,
                "products": str(set(training.products.values())),
            }
            found["host_gap_ms"] = 1000 * timing.seconds - kernels.busy_ms
        except Exception as error:  # a profiler may not be allowed here
            found["profiler"] = f"{type(error).__name__}: {error}"
        found["loss"] = float(training.update(training.stage.end_step)[0])
    except Exception as error:
        if run.dry or "device-side" in str(error):
            raise
        run.expect(f"{row.name}: {type(error).__name__}: {str(error)[:200]}", False)
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    release(run)
    return found


def stepper(training: StageTraining) -> Callable[[], torch.Tensor]:
    steps = iter(updates_of(training))

    def step() -> torch.Tensor:
        loss, _ = training.update(next(steps))
        training.optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def speed_of(run: Run, request: StepRequest, timing: Timing) -> dict[str, Any]:
    tokens = request.profile.batch.tokens
    speed = tokens / timing.seconds
    parameters = plan(request.profile).parameters or 0
    return {
        "tokens_per_second": speed,
        "tokens": tokens,
        "mfu_of_full_rank": 6 * parameters * speed / PEAK_FLOPS,
        "mfu": request.flops_per_token * speed / PEAK_FLOPS,
        "flops_per_token": request.flops_per_token,
        **timing.as_record(),
    }


# --- B2


def breakdown(run: Run) -> None:
    run.need_gpu_memory(LARGE)
    for row in (BILLION,) if run.dry else (BILLION, replace(BILLION, compiled=True)):
        release(run)
        training = shape_stage(run, row.request(run))
        step = stepper(training)
        timed(run, step, steps=2)
        kernels = kernels_of(run, step, steps=1 if run.dry else 3)
        by_shape = kernels_of(run, step, shapes=True)
        run.record(
            **{
                row.name: {
                    "ms by kind": kernels.by_class_ms,
                    "idle_ms": kernels.span_ms - kernels.busy_ms,
                    "span_ms": kernels.span_ms,
                    "kernels": kernels.count,
                    "longest": kernels.by_name[:25],
                    "products": by_shape.products_ms,
                }
            }
        )
        del training, step
    run.record(kinds=CLASSES)


# --- B12


def host(run: Run) -> None:
    for name in ("llama_60m",) if run.dry else ("llama_60m", "llama_130m", "llama_250m"):
        for compiled in (False, True):
            row = Row(profile=name, sequences=8, compiled=compiled)
            found = measured_row(run, row)
            run.record(**{row.name: found})
            if "busy_ms" in found and found["device_ms"]:
                run.record(**{f"busy share, {row.name}": found["busy_ms"] / found["device_ms"]["median"]})
    run.record(kernels_a_second=launch_rate(run), update_in_a_graph=captured(run))


def launch_rate(run: Run) -> float:
    """Return how many small kernels a second this host starts."""
    x, count = torch.ones(8, device=run.device), 1_000 if run.dry else 20_000
    for _ in range(100):
        x.add_(1)
    started = time.perf_counter()
    for _ in range(count):
        x.add_(1)
    x.sum().item()
    return count / (time.perf_counter() - started)


def captured(run: Run) -> str:
    """Return why an update cannot be captured as a CUDA graph, or that it can."""
    if run.dry:
        return "skipped: no CUDA graphs on a CPU"
    try:
        training = shape_stage(run, Row(profile="llama_60m", sequences=8).request(run))
        steps = iter(updates_of(training))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                training.update(next(steps))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            training.update(next(steps))
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    return "possible"


# --- B13


def others(run: Run) -> None:
    """The arms of tests/benchmarks/step.py beside ours, one after the other in this process."""
    step_program = benchmark()
    for name in ("llama_350m",) if run.dry else ("llama_350m", "llama_1b"):
        base = shape_request(run, name, batch__micro_sequences=16, launch__compile=False)
        requests = step_program.arms(step_requests(base.profile, updates=10_000))
        compiled = shape_request(run, name, batch__micro_sequences=16, launch__compile=True)
        speeds: dict[str, float] = {}
        for arm in ("paper", "peft", "peft and liger", RELORA, f"{RELORA}, compiled"):
            request = compiled if arm.endswith("compiled") else requests[arm.partition(" and ")[0]]
            found = other_arm(run, step_program, request, liger=arm.endswith("liger"))
            run.record(**{f"{name}, {arm}": found})
            speeds[arm] = found.get("tokens_per_second", 0.0)
        for arm in ("paper", "peft"):
            for ours in (RELORA, f"{RELORA}, compiled"):
                ratio = speeds[ours] / speeds[arm] if speeds[arm] else float("nan")
                run.record(**{f"{name}, {ours} over {arm}": ratio})
            run.expect(f"{name}: ours is {ratio:.2f} times as fast as {arm}", ratio > 1)
    unsloth = importlib.util.find_spec("unsloth") is not None
    run.record(unsloth="not measured: it changes transformers for a whole process" if unsloth else "not installed")


def other_arm(run: Run, step_program: Any, request: StepRequest, *, liger: bool) -> dict[str, Any]:
    release(run)
    if liger and importlib.util.find_spec("liger_kernel") is None:
        return {"skipped": "liger-kernel is not installed"}
    try:
        training = shape_stage(run, request)
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=training.model)
        built = step_program.build(request, training)
        timing = timed(run, built.update)
        found = {**speed_of(run, request, timing), "peak_gb": peak_gb(run)}
        del training, built
    except Exception as error:
        if run.dry:
            raise
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    release(run)
    return found


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("step_benchmark", STEP_PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
