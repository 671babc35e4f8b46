"""A8 to A10: whole stages on the device, the same twice, and batches that arrive as they were sent."""

import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import closing, suppress
from typing import Any

import torch
from check_run import Run
from stage_runs import ignore, manifest_of, run_all
from stages import tiny_dataset, tiny_request, tiny_stage, updates_of
from torch import Tensor

from relora_train.checkpoints.snapshots import local_snapshots
from relora_train.data.dataset import TokenDataset
from relora_train.distributed import Ranks
from relora_train.errors import TrainerInterruptedError
from relora_train.events import Event
from relora_train.runs.workers import Worker
from relora_train.training.requests import EvaluationRequest, StageRequest
from relora_train.training.step import Prefetcher
from relora_train.training.trainer import run_stage

TRAINER, EVALUATION = "relora_train.training.trainer", "relora_train.training.evaluate"
STAGES = ("warm-start", "cycle-1", "cycle-2")
RUN: dict[str, Any] = {
    "precision": {"dtype": "bfloat16"},
    "relora": {"dropout": 0.1},
    "optimizer": {"learning_rate": 3e-3},
    "evaluation": {"sequences": 64, "sample_prompts": ("a", "b"), "sample_tokens": 8},
}
LARGEST_RISE = 50e6


# --- A8


def whole_run(run: Run) -> None:
    """Three stages and an evaluation in one kept worker, beside the same on a CPU in this process."""
    free: list[int] = []
    events: list[Event] = []
    with closing(Worker(keeps=True)) as worker:
        for before, stage in zip((None, *STAGES), STAGES, strict=False):
            parent = run.scratch / before if before else None
            request = tiny_request(run, stage, stage, parent=parent, **RUN)
            worker.run(TRAINER, request, run.scratch / "request.json", on_event=events.append)
            if not run.dry:
                free.append(torch.cuda.mem_get_info()[0])
        scored = evaluate(run, worker, request)
    pids = {event["pid"] for event in events if event["event"] == "stage_started"}
    run.require(f"all stages ran in one process: {pids}", len(pids) == 1)
    compare_with_cpu(run, scored)
    if free:
        run.below("bytes more held after later stages", max(free[0] - each for each in free), LARGEST_RISE)
    stop_and_continue(run)


def evaluate(run: Run, worker: Any, trained: StageRequest) -> dict[str, Any]:
    request = EvaluationRequest(
        profile=trained.profile,
        checkpoint_directory=trained.output_directory,
        dataset_directory=trained.dataset_directory,
        result_path=run.scratch / "evaluation.json",
        sequences=64,
    )
    worker.run(EVALUATION, request, run.scratch / "request.json", on_event=lambda event: None)
    scored: dict[str, Any] = json.loads(request.result_path.read_text())
    run.record(evaluation=scored)
    run.require("the evaluation has samples", len(scored["samples"]) == 2 and all(s["text"] for s in scored["samples"]))
    return scored


def compare_with_cpu(run: Run, scored: dict[str, Any]) -> None:
    profile = tiny_request(run, "cycle-1", "unused", launch={"device": "cpu"}, **RUN).profile
    run_all(profile, tiny_dataset(run), run.scratch / "cpu")
    for stage in STAGES:
        losses = [manifest_of(place / stage)["evaluation"]["val_loss"] for place in (run.scratch, run.scratch / "cpu")]
        run.record(**{f"validation losses of {stage}, device and CPU": losses})
        run.require(f"{stage}: {losses}", abs(losses[0] - losses[1]) < 0.01 * losses[1])
    last = manifest_of(run.scratch / "cycle-2")["evaluation"]["val_loss"]
    run.require(f"evaluated {scored['val_loss']}, committed {last}", abs(scored["val_loss"] - last) < 0.01 * last)


def stop_and_continue(run: Run) -> None:
    """Stop cycle 1 with SIGTERM in this process, go on from its snapshot, and compare bytes."""
    plain = tiny_request(run, "cycle-1", "stopped", parent=run.scratch / "warm-start", **RUN)
    request = plain.model_copy(update={"snapshots_directory": run.scratch / "snapshots"})
    stopped_at: list[int] = []

    def stop(event: str, **fields: Any) -> None:
        if event == "progress" and not stopped_at:
            stopped_at.append(fields["step"])
            os.kill(os.getpid(), signal.SIGTERM)

    with suppress(TrainerInterruptedError):
        run_stage(request, stop)
    saved = local_snapshots(run.scratch / "snapshots")
    run.record(stopped_at=stopped_at, snapshots=saved)
    run.require(
        "a stopped stage commits nothing and leaves a snapshot", bool(saved) and not plain.output_directory.exists()
    )
    run_stage(request.model_copy(update={"snapshot_directory": run.scratch / "snapshots" / max(saved)}), ignore)
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        ours, theirs = (run.scratch / place / name for place in ("stopped", "cycle-1"))
        run.require(f"{name} has the same bytes", ours.read_bytes() == theirs.read_bytes())


# --- A9


def determinism(run: Run) -> None:
    twice(run, compiled=False)


def determinism_compiled(run: Run) -> None:
    twice(run, compiled=True)


def twice(run: Run, *, compiled: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ends = [end_of_ten(run, compiled) for _ in range(2)]
    unsure = sorted({str(each.message).splitlines()[0] for each in said if "deterministic" in str(each.message)})
    run.record(**{"kernels without determinism": unsure})
    run.require(f"no kernel warns: {unsure[:2]}", not unsure)
    same = [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])]
    run.require(f"tensors that differ: {same[:5]}", not same)


def end_of_ten(run: Run, compiled: bool) -> dict[str, Tensor]:
    """Return all weights after ten updates of a cycle and of a warm start."""
    found = {}
    for stage in ("cycle-1",) if run.dry and compiled else ("warm-start", "cycle-1"):
        schedule = {"warm_start_steps": 10, "cycle_length": 10}
        training = tiny_stage(
            run,
            stage,
            schedule=schedule,
            launch={"compile": compiled},
            precision=RUN["precision"],
            relora=RUN["relora"],
        )
        for step in updates_of(training):
            training.update(step)
            training.optimizer.zero_grad(set_to_none=True)
        found |= {f"{stage} {name}": tensor.clone() for name, tensor in training.model.state_dict().items()}
    return found


# --- A10


def prefetch(run: Run) -> None:
    """A consumer reads each batch long after it was asked for, behind other work on the stream."""
    dataset = TokenDataset(tiny_dataset(run), "train", sequence_length=32)
    reader = Prefetcher(dataset, sequences=8, ranks=Ranks(rank=0, world_size=1, device=run.device))
    batches, kept = (50 if run.dry else 500), []
    for number in range(batches):
        rows = reader.batch(8 * number, last=number == batches - 1).to(run.device, non_blocking=True)
        if not run.dry:
            torch.cuda._sleep(200_000)
        kept.append(rows + 0)  # read on the stream, after the sleep
        del rows
    wrong = [
        number
        for number, rows in enumerate(kept)
        if not torch.equal(rows.cpu(), torch.from_numpy(dataset.read_batch(8 * number, 8, rank=0, world_size=1)))
    ]
    run.record(batches=batches)
    run.require(f"batches that differ: {wrong[:5]}", not wrong)
    own_gpu_only(run)


def own_gpu_only(run: Run) -> None:
    if run.dry or torch.cuda.device_count() < 2:
        run.record(**{"a rank makes no context on GPU 0": "skipped: it takes two GPUs"})
        return
    held = torch.cuda.mem_get_info(0)[0]
    program = (
        "import os, sys, torch\n"
        "from relora_train.distributed import process_group\n"
        "os.environ['LOCAL_RANK'] = '1'\n"
        "with process_group('cuda') as ranks:\n"
        "    torch.ones(8, device=ranks.device).pin_memory if False else torch.ones(8, device=ranks.device)\n"
        "    torch.ones(8).pin_memory()\n"
        "    sys.stdout.write('here\\n'); sys.stdout.flush(); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        rise = held - torch.cuda.mem_get_info(0)[0]
        process.stdin.write("\n")
        process.stdin.close()
    run.below("bytes that a rank of GPU 1 takes on GPU 0", rise, 100e6)
