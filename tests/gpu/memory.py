"""B8 to B10: what fits, what a snapshot and a stop take, and what the end of a cycle takes, at 1.3 billion."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import speed
import torch
from check_run import Run, SkippedError
from speed import BILLION, FULL, Row, stepper
from stages import release, shape_request, shape_stage, updates_of
from timing import wait

from relora_train.checkpoints.manifest import describe_files
from relora_train.method.layer import relora_layers
from relora_train.method.update_size import UpdateMeter
from relora_train.runs.plan import plan
from relora_train.settings.running import SnapshotConfig
from relora_train.training.commit import merged_weights
from relora_train.training.end_of_cycle import finish_cycle, stage_adapter
from relora_train.training.files import save_model, save_optimizer_state
from relora_train.training.optimizer import optimizer_state_by_name
from relora_train.training.snapshot import Progress, Snapshotter
from relora_train.training.step import StageTraining
from relora_train.training.torch_settings import process_bytes

CARD = 24e9
STOP_SECONDS = 25.0
T = TypeVar("T")


# --- B8


def peaks(run: Run) -> None:
    for row in (BILLION, replace(BILLION, compiled=True), FULL):
        compare_with_plan(run, row)
    cases: dict[str, dict[str, Any]] = {
        f"cycle, compiled, micro-batch {sequences}": {"batch__micro_sequences": sequences, "launch__compile": True}
        for sequences in (16, 8, 4)
    }
    eager = {"launch__compile": False, "launch__gradient_checkpointing": True}
    cases["cycle, eager, checkpointing, 16"] = {"batch__micro_sequences": 16, **eager}
    cases["cycle, eager, 8"] = {"batch__micro_sequences": 8, "launch__compile": False}
    for dtype in ("bfloat16", "pure-bfloat16"):
        for sequences in (4, 1):
            name = f"warm start, {dtype}, checkpointing, {sequences}"
            cases[name] = {"low_rank": False, "precision__dtype": dtype, "batch__micro_sequences": sequences, **eager}
    for name, settings in list(cases.items())[1::2] if run.dry else cases.items():
        run.record(**{f"in 24 GB: {name}": fits(run, settings)})


def compare_with_plan(run: Run, row: Row) -> None:
    """Judge the peak that B1 measured if plan counts activations, else write down what they take."""
    run.expect(f"{row.name}: measured by B1", row.name in speed.MEASURED)
    peak = speed.MEASURED.get(row.name, {}).get("peak_gb")
    cost = plan(row.request(run).profile)
    estimate = (cost.low_rank if row.low_rank else cost.full).memory
    found = {"plan, GB": {name: size / 1e9 for name, size in estimate}, "total of plan": estimate.total / 1e9}
    run.record(**{row.name: {"peak of B1, GB": peak, **found}})
    if peak is not None and any("activation" in name for name, _ in estimate):
        ratio = peak / (estimate.total / 1e9)
        run.expect(f"{row.name}: the peak is {ratio:.2f} of plan's", 0.9 <= ratio <= 1.1)


def fits(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """Return whether two updates of llama_1b fit a card of 24 GB, and their peak."""
    release(run)
    found: dict[str, Any] = {"fits": True}
    try:
        training = shape_stage(run, shape_request(run, "llama_1b", **settings))
        release(run)
        if not run.dry:
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / whole))
        step = stepper(training)
        for _ in range(2):
            step()
        wait(run)
    except torch.OutOfMemoryError as error:
        found = {"fits": False, "error": str(error)[:300]}
    if not run.dry:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.set_per_process_memory_fraction(1.0)
    return found


# --- B9


def snapshot_and_stop(run: Run) -> None:
    """A snapshot of a warm start and one at a stop, by the class that makes a stage's."""
    run.need_gpu_memory(speed.LARGE)
    need_disk(run, 40e9)
    training = shape_stage(run, FULL.request(run))
    profile = training.profile.model_copy(update={"snapshots": SnapshotConfig(every_steps=1, every_seconds=None)})
    update = {"profile": profile, "snapshots_directory": run.scratch / "snapshots", "fingerprint": "0" * 64}
    training.request = training.request.model_copy(update=update)
    (run.scratch / "snapshots").mkdir()
    events: list[dict[str, Any]] = []
    snapshotter = Snapshotter(training, lambda event, **fields: events.append({"event": event, **fields}))
    first = training.stage.first_step
    losses = torch.zeros((), dtype=torch.float64, device=run.device)
    host_before = process_bytes("VmRSS")
    training.update(first)
    seconds, _ = clocked(run, lambda: snapshotter.after_step(Progress(first, [], losses, 1, 0.0)))
    snapshotter.wait()
    run.record(snapshot={"training waited, s": seconds, **events[-1]})
    shutil.rmtree(events[-1].get("directory", run.scratch / "none"), ignore_errors=True)
    training.update(first + 1)
    seconds, saved = clocked(run, lambda: snapshotter.at_stop(Progress(first + 1, [], losses, 1, 0.0)))
    run.record(at_stop={"seconds": seconds, "saved": saved, **events[-1]})
    run.record(host_bytes={"before": host_before, "after": process_bytes("VmRSS")})
    size, stall = events[-1].get("size_bytes", 0), events[-1].get("stall_seconds", 1)  # the buffers are there by now
    run.record(**{"device to host, GB/s": size / stall / 1e9, "to the disk, GB/s": size / seconds / 1e9})
    run.require("the state is saved at a stop", saved)
    run.expect(f"saved within {STOP_SECONDS:.0f} s of a stop: {seconds:.1f} s", seconds < STOP_SECONDS)


def need_disk(run: Run, size: float) -> None:
    free = shutil.disk_usage(run.scratch).free
    if not run.dry and free < size:
        raise SkippedError(f"{size / 1e9:.0f} GB of disk are needed in {run.scratch}, {free / 1e9:.0f} are free")


def clocked(run: Run, work: Callable[[], T]) -> tuple[float, T]:
    wait(run)
    started = time.perf_counter()
    found = work()
    wait(run)
    return time.perf_counter() - started, found


# --- B10


def end_of_cycle(run: Run) -> None:
    """The very functions with which a cycle ends, bfloat16 with exact weights on the disk."""
    run.need_gpu_memory(speed.LARGE)
    need_disk(run, 30e9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run.record(
        **{"finish_cycle, 6 of 24 layers, one thread": finished(run, trained_cycle(run, layers=1 if run.dry else 6))[0]}
    )
    release(run)
    torch.set_num_threads(threads)
    training = trained_cycle(run, layers=None)
    meter = UpdateMeter(training.model)
    begin, _ = clocked(run, meter.begin)
    training.update(training.stage.first_step + 2)
    end, _ = clocked(run, meter.end)
    run.record(update_meter={"begin_s": begin, "end_s": end, "layers": len(list(relora_layers(training.model)))})
    parts: dict[str, Callable[[], Any]] = {
        "adapter": lambda: stage_adapter(training),
        "finish_cycle": lambda: finished(run, training)[1],
        "save_model": lambda: save_model(training.model, run.scratch / "model", weights=merged_weights(training)),
        "save_optimizer": lambda: save_optimizer_state(
            optimizer_state_by_name(training.optimizer, training.model), run.scratch / "model" / "optimizer.safetensors"
        ),
        "hash": lambda: describe_files(run.scratch / "model"),
    }
    for name, part in parts.items():
        seconds, found = clocked(run, part)
        run.record(**{name: seconds})
        if name == "finish_cycle":
            report = {key: value for key, value in found.items() if key != "layers"}
            run.record(merge=report, threads=torch.get_num_threads())
            change = report["max_relative_output_change"]
            run.require(f"the merge changed the output by {change}", change < 0.1)
    size = sum(path.stat().st_size for path in (run.scratch / "model").rglob("*"))
    run.record(bytes_written=size)


def finished(run: Run, training: StageTraining) -> tuple[float, dict[str, Any]]:
    return clocked(run, lambda: finish_cycle(training, [], lambda event, **fields: None))


def trained_cycle(run: Run, *, layers: int | None) -> StageTraining:
    """Return a cycle after two updates, with an update in every layer."""
    settings = {} if layers is None else {"model__num_hidden_layers": layers}
    request = shape_request(run, "llama_1b", launch__compile=False, **settings)
    training = shape_stage(run, request, keep_masters=True)
    for step in updates_of(training)[:2]:
        training.update(step)
        training.optimizer.zero_grad(set_to_none=True)
    for _, layer in relora_layers(training.model):
        layer.lora_B.data.normal_(std=1e-3)
    return training
