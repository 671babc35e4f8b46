"""How long something takes on the device and on the host, and which kernels it is made of."""

import itertools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from check_run import Run
from torch.profiler import ProfilerActivity, profile

WARM_UP, STEPS = 3, 10


@dataclass
class Timing:
    """Milliseconds of each of some steps, by the device's clock and the host's; and of the very first."""

    device_ms: list[float]
    wall_ms: list[float]
    first_seconds: float

    @property
    def seconds(self) -> float:
        """The median step, by the device's clock where there is one."""
        return statistics.median(self.device_ms or self.wall_ms) / 1000

    def as_record(self) -> dict[str, Any]:
        return {"device_ms": spread(self.device_ms), "wall_ms": spread(self.wall_ms), "first_s": self.first_seconds}


def spread(values: list[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def timed(run: Run, step: Callable[[], Any], *, steps: int = STEPS, warm_up: int = WARM_UP) -> Timing:
    """Time a step. The host waits for the device after the last one only; a gap between the clocks is the host's."""
    started = time.perf_counter()
    step()
    wait(run)
    first = time.perf_counter() - started
    for _ in range(warm_up - 1):
        step()
    wait(run)
    if run.dry:
        steps = 2
    marks: list[torch.cuda.Event] = []
    clock = [time.perf_counter()]
    for number in range(steps + 1):
        if not run.dry:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        if number < steps:
            step()
            if number == steps - 1:
                wait(run)
            clock.append(time.perf_counter())
    wait(run)
    device = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return Timing(device, [1000 * (b - a) for a, b in itertools.pairwise(clock)], first)


def wait(run: Run) -> None:
    if not run.dry:
        torch.cuda.synchronize()


def peak_gb(run: Run) -> float | None:
    return None if run.dry else torch.cuda.max_memory_allocated() / 1e9


CLASSES = {
    "copy": r"memcpy|memset",
    "attention": r"flash|fmha|attention|sdpa|softmax_warp_forward.*attn",
    "product": r"gemm|cutlass|cublas|nvjet|xmma|splitk|gemv|ampere_|sm80_|sm90_|wgmma",
    "optimizer": r"adam|multi_tensor|lerp",
    "dropout": r"bernoulli|philox|distribution|dropout|random",
    "loss": r"log_?softmax|nll|cross_entropy|scatter|gather",
    "norm, rope, swiglu": r"rms|norm|rsqrt|silu|cos|sin",
    "cast": r"direct_copy|copy_kernel|convert|bfloat16_copy|to_copy",
    "reduction": r"reduce|sum",
    "compiled": r"triton",
    "elementwise": r"elementwise|vectorized|add|mul|cat",
}
"""Kinds of kernels by their names; the first that fits."""


@dataclass
class Kernels:
    """The profiler's view of some steps, each figure for one step."""

    count: float = 0.0
    busy_ms: float = 0.0
    span_ms: float = 0.0
    by_class_ms: dict[str, float] = field(default_factory=dict)
    by_name: list[tuple[str, float, float]] = field(default_factory=list)
    """Name, milliseconds, number; the longest first."""

    products_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of products, by the shapes of their factors."""

    exposed_ms: float = 0.0
    """Time in which nothing but NCCL's kernels ran."""

    @property
    def busy_share(self) -> float:
        return self.busy_ms / self.span_ms if self.span_ms else 0.0


def kernels_of(run: Run, step: Callable[[], Any], *, steps: int = 1, shapes: bool = False) -> Kernels:
    """Profile some steps. shapes: also the host's side, which makes the steps slower and tells sizes of products."""
    activities = [ProfilerActivity.CPU] if run.dry else [ProfilerActivity.CUDA]
    if shapes and not run.dry:
        activities.append(ProfilerActivity.CPU)
    wait(run)
    with profile(activities=activities, record_shapes=shapes) as seen:
        for _ in range(steps):
            step()
        wait(run)
    found = Kernels()
    wanted = torch.autograd.DeviceType.CPU if run.dry else torch.autograd.DeviceType.CUDA
    by_name: dict[str, list[float]] = defaultdict(list)
    begins, ends = list[float](), list[float]()
    spans: list[tuple[float, float, bool]] = []
    for event in seen.events() or ():
        if event.device_type == wanted and not is_annotation(event):
            by_name[event.name].append(event.time_range.elapsed_us() / 1000)
            begins.append(event.time_range.start)
            ends.append(event.time_range.end)
            spans.append((begins[-1], ends[-1], "nccl" in event.name.lower()))
    classes: dict[str, float] = defaultdict(float)
    for name, times in by_name.items():
        classes[class_of(name)] += sum(times) / steps
        found.by_name.append((name[:160], sum(times) / steps, len(times) / steps))
    found.by_name.sort(key=lambda entry: -entry[1])
    found.count = sum(len(times) for times in by_name.values()) / steps
    found.busy_ms = sum(classes.values())
    found.span_ms = (max(ends) - min(begins)) / 1000 / steps if ends else 0.0
    found.exposed_ms = exposed_us(spans) / 1000 / steps
    found.by_class_ms = dict(sorted(classes.items(), key=lambda entry: -entry[1]))
    if shapes:
        found.products_ms = product_times(seen, steps)
    return found


def is_annotation(event: Any) -> bool:
    """Return True for a span that somebody named, which is no kernel but has kernels in it."""
    names = ("ProfilerStep", "Optimizer.", "Context", "##", "Torch-Compiled", "nccl:")
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(names)


def exposed_us(spans: list[tuple[float, float, bool]]) -> float:
    """Return the time in which a marked span runs and no other does."""
    marks = sorted([(a, 1, nccl) for a, _, nccl in spans] + [(b, -1, nccl) for _, b, nccl in spans])
    running, total, last = {True: 0, False: 0}, 0.0, 0.0
    for moment, change, nccl in marks:
        if running[True] and not running[False]:
            total += moment - last
        running[nccl] += change
        last = moment
    return total


def product_times(seen: Any, steps: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for average in seen.key_averages(group_by_input_shape=True):
        if average.key in ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_"):
            sides = [shape for shape in average.input_shapes if len(shape) >= 2][-2:]
            spent = getattr(average, "self_device_time_total", 0) or average.self_cpu_time_total
            found[f"{average.key} {sides} x{average.count // steps}"] = spent / 1000 / steps
    return dict(sorted(found.items(), key=lambda entry: -entry[1])[:40])


def class_of(name: str) -> str:
    return next((kind for kind, words in CLASSES.items() if re.search(words, name, re.IGNORECASE)), "other")
