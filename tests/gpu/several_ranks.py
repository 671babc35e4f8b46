"""C0 to C5: one rank that speaks to itself, two that are one, two of which one fails, and two machines."""

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import scaling_rank
import speed
import torch
import torch.distributed as dist
from check_run import Run, SkippedError
from faults import environment, failed
from right_numbers import relative
from safetensors.torch import load_file
from stage_runs import ignore, metrics_of
from stages import tiny_request, tiny_stage
from tiny_data import write_tiny_dataset

from relora_train.devices import dropout_mask_here
from relora_train.distributed import SLOW, STEP, Ranks, full_tensor
from relora_train.errors import DeviceMemoryError, TrainerCrashedError
from relora_train.events import Event
from relora_train.method.stages import plan_stages
from relora_train.runs.workers import Worker, run_worker
from relora_train.settings.running import LaunchConfig
from relora_train.training.build import prepare_stage
from relora_train.training.commit import save_sharded
from relora_train.training.end_of_cycle import finish_cycle
from relora_train.training.requests import StageRequest
from relora_train.training.trainer import run_stage

TRAINER = "relora_train.training.trainer"
SECTIONS: dict[str, Any] = {
    "relora": {"dropout": 0.0},
    "schedule": {"warm_start_steps": 0, "cycles": 1, "cycle_length": 6, "warmup_steps": 2},
    "evaluation": {"sequences": 16},
}
TOLD_WITHIN = 60.0


def gpus(run: Run, *, needed: int = 2) -> int:
    """Return the number of GPUs, in a dry run two ranks of a CPU. Raises SkippedError for too few."""
    count = 2 if run.dry else torch.cuda.device_count()
    if count < needed:
        raise SkippedError(f"it takes {needed} GPUs, there is {count}")
    return count


@contextmanager
def group_of_one(run: Run) -> Iterator[None]:
    """Join a group of one rank, as process_group joins larger ones."""
    if not run.dry:
        torch.cuda.set_device(run.device)
    backend = "gloo" if run.dry else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


# --- C0


def one_rank(run: Run) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with group_of_one(run):
            for device in {torch.device("cpu"), run.device}:
                values = torch.arange(4.0, device=device)
                dist.all_reduce(values)
                dist.broadcast(values, src=0)
                run.require(f"a sum of one on {device.type}", values.tolist() == [0.0, 1.0, 2.0, 3.0])
            dist.barrier()
            dist.distributed_c10d._set_pg_timeout(STEP)
            many = torch.ones(1000 if run.dry else 250_000_000, device=run.device)
            run.record(**{"a gigabyte summed": speed.timed(run, lambda: dist.all_reduce(many)).as_record()})
    texts = [str(each.message) for each in said]
    run.record(warnings=texts[:5], limits_s=[SLOW.total_seconds(), STEP.total_seconds()])
    run.require(f"warnings of devices: {texts[:2]}", not any("device under current context" in text for text in texts))


# --- C1


def sharded_alone(run: Run) -> None:
    """bfloat16 frozen weights beside float32 trained ones, on a mesh of one device."""
    sections: dict[str, Any] = {"precision": {"dtype": "bfloat16"}, "relora": {"dropout": 0.0}}
    whole = tiny_stage(run, "cycle-1", **sections)
    with group_of_one(run):
        ranks = Ranks(rank=0, world_size=1, device=run.device, sharded=True)
        sharded = prepare_stage(tiny_request(run, "cycle-1", "sharded", **sections), ranks)
        first = whole.stage.first_step
        losses = []
        for step in range(first, first + 3):
            losses.append([float(training.update(step)[0]) for training in (whole, sharded)])
            for training in (whole, sharded):
                training.optimizer.zero_grad(set_to_none=True)
        run.record(losses=losses)
        worst = max(abs(a - b) / a for a, b in losses)
        run.below("losses beside the whole model's", worst, 1e-3)
        for training in (whole, sharded):
            finish_cycle(training, [], ignore)
        (run.scratch / "saved").mkdir()
        save_sharded(sharded, run.scratch / "saved")
        saved = load_file(run.scratch / "saved" / "model.safetensors")
        ours, theirs = dict(sharded.model.named_parameters()), dict(whole.model.named_parameters())
        errors = {
            name: relative(full_tensor(p.detach()), theirs[name].detach()) for name, p in ours.items() if name in saved
        }
        run.record(tensors=len(saved))
        run.below("merged weights beside the whole model's", max(errors.values()), 2e-2)
        stored = max(relative(saved[name], full_tensor(ours[name].detach()).float().cpu()) for name in errors)
        run.below("saved weights beside those in memory", stored, 5e-3)  # these are rounded to bfloat16


# --- C2


def two_ranks(run: Run) -> None:
    gpus(run)
    alone = tiny_request(run, "cycle-1", "alone", **SECTIONS)
    run_stage(alone, ignore)
    for sharding in ("none",) if run.dry else ("none", "full"):
        ours = trained_by_ranks(run, 2, sharding)
        compare_losses(run, f"sharding {sharding}", ours, alone.output_directory)


def trained_by_ranks(run: Run, count: int, sharding: str = "none") -> Path:
    """Return the checkpoint of a cycle by so many ranks on this machine, made once for all checks."""
    place = run.shared / f"{count}-ranks-{sharding}"
    if not place.exists():
        request = ranks_request(run, "unused", count, sharding=sharding, stage="cycle-1", **SECTIONS)
        request = request.model_copy(update={"output_directory": place})
        run_worker(
            TRAINER, request, run.scratch / "request.json", on_event=ignore, launch=LaunchConfig(nproc_per_node=count)
        )
    return place


def ranks_request(
    run: Run, output: str, ranks: int, *, stage: str = "warm-start", sharding: str = "none", **sections: Any
) -> StageRequest:
    launch = {"nproc_per_node": ranks, "sharding": sharding, "threads": 1, **sections.pop("launch", {})}
    return tiny_request(run, stage, output, launch=launch, **sections)


def compare_losses(run: Run, name: str, ours: Path, theirs: Path) -> None:
    losses = [[record["loss"] for record in metrics_of(place)] for place in (ours, theirs)]
    run.record(**{f"losses, {name}": losses})
    run.below(f"losses beside one rank's, {name}", max(abs(a - b) / b for a, b in zip(*losses, strict=True)), 1e-5)
    weights = [load_file(place / "model.safetensors") for place in (ours, theirs)]
    worst = max(relative(weights[0][name], tensor) for name, tensor in weights[1].items())
    run.below(f"weights beside one rank's, {name}", worst, 1e-3)


# --- C3


def failing_rank(run: Run) -> None:
    gpus(run)
    for how, expected in (("memory", DeviceMemoryError), ("killed", TrainerCrashedError))[: 1 if run.dry else 2]:
        request = ranks_request(run, how, 2, schedule={"warm_start_steps": 10_000_000})
        with environment(FAILS_BY=how):
            failed(
                run,
                f"a rank fails: {how}",
                request,
                expected,
                limit=TOLD_WITHIN,
                module="failing_rank",
                launch=LaunchConfig(nproc_per_node=2),
            )


# --- C4


def scaling(run: Run) -> None:
    """llama_1b on 1, 2 and all GPUs; one tiny rank in a dry run."""
    counts = [1] if run.dry else sorted({1, 2, gpus(run)})
    for sharding in ("none", "full"):
        for count in counts if sharding == "none" else [c for c in counts if c > 1]:
            name = f"{count} GPUs, sharding {sharding}"
            try:
                by_rank = scaled(run, scaling_request(run, count, sharding))
            except Exception as error:
                if run.dry:
                    raise
                run.record(**{name: f"{type(error).__name__}: {error}"})
                continue
            run.record(**{name: by_rank})
            run.require(f"{count} ranks tell of themselves", len(by_rank) == count)


def scaled(run: Run, request: StageRequest) -> list[dict[str, Any]]:
    """Return what each rank says of itself."""
    seen: list[dict[str, Any]] = []
    if run.dry:  # a process costs more than what it does
        scaling_rank.measure(request, lambda event, **fields: seen.append({"event": event, **fields}))
    else:
        ranks = request.profile.launch.nproc_per_node
        path = run.scratch / "request.json"
        run_worker("scaling_rank", request, path, on_event=seen.append, launch=LaunchConfig(nproc_per_node=ranks))
    return sorted((event for event in seen if event["event"] == "scaled"), key=lambda event: event["rank"])


def scaling_request(run: Run, count: int, sharding: str) -> StageRequest:
    row = replace(speed.BILLION, compiled=not run.dry)
    bench = row.request(run)
    settings = bench.profile.model_dump()
    settings["batch"] |= {"sequences": count * bench.profile.batch.sequences}
    settings["launch"] |= {"nproc_per_node": count, "sharding": sharding}
    bench = bench.model_copy(update={"profile": type(bench.profile).model_validate(settings)})
    directory = run.scratch / f"dataset-{count}-{sharding}"
    dataset = write_tiny_dataset(directory, train_tokens=bench.profile.batch.tokens + 1)
    base = tiny_request(run, "cycle-1", f"scaling-{count}-{sharding}")
    update = {"profile": bench.profile, "stage": plan_stages(bench.profile)[1], "dataset_directory": dataset}
    return base.model_copy(update={**update, "dropout_mask": dropout_mask_here(bench.profile)})


# --- C5


def two_agents(run: Run) -> None:
    """`relora join` on this machine's loopback, with half of the GPUs; the flow's side has the other half."""
    count = gpus(run)
    half = count // 2
    together = trained_by_ranks(run, 2 * half)
    endpoint = f"127.0.0.1:{free_port()}"
    launch = {"nnodes": 2, "rdzv_endpoint": endpoint}
    request = ranks_request(run, "apart", half, stage="cycle-1", launch=launch, **SECTIONS)
    meeting = ["--rdzv-endpoint", endpoint, "--nnodes", "2", "--node-rank", "1", "--device", run.device_type]
    command = [sys.executable, "-m", "relora_train.cli.app", "join", *meeting, "--nproc-per-node", str(half)]
    ours, theirs = (",".join(map(str, range(first, first + half))) for first in (0, half))
    other = {**os.environ, "CUDA_VISIBLE_DEVICES": theirs}
    with subprocess.Popen([*command, "--wait-seconds", "120"], stderr=subprocess.PIPE, text=True, env=other) as joined:
        try:
            with environment(CUDA_VISIBLE_DEVICES=ours):
                path, seen = run.scratch / "request.json", list[Event]()
                Worker().run(TRAINER, request, path, on_event=seen.append, launch=request.profile.launch)
            said = joined.communicate(timeout=90)[1]
        finally:
            joined.kill()
    run.record(said=said[-600:], ranks=seen[0].get("ranks"))
    run.require("both machines' ranks took part", seen[0].get("ranks") == 2 * half and joined.returncode == 0)
    compare_losses(run, "two machines", request.output_directory, together)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
