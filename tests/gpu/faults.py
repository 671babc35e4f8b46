"""A11: what goes wrong on a GPU ends with its own name, in time, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from check_process import descendants
from check_run import Run
from stages import tiny_request

from relora_train.errors import DeviceError, DeviceMemoryError, ReLoRAError, TrainerCrashedError
from relora_train.events import Event
from relora_train.runs.workers import run_worker
from relora_train.settings.running import LaunchConfig
from relora_train.training.requests import StageRequest

TRAINER = "relora_train.training.trainer"
IN_TIME = 15.0


def named_faults(run: Run) -> None:
    for fault in (out_of_memory, more_ranks_than_gpus, no_gpu, unused_gpu, killed_trainer):
        try:
            fault(run)
        except Exception as error:
            run.record(**{f"error in {fault.__name__}": f"{type(error).__name__}: {error}"})
            run.require(f"{fault.__name__} could be tried: {type(error).__name__}", False)


def failed(
    run: Run,
    what: str,
    request: StageRequest,
    expected: type[ReLoRAError],
    *,
    limit: float,
    module: str = TRAINER,
    **options: Any,
) -> ReLoRAError | None:
    """Run the stage in a process of its own, and note the error it ended with and what is left of it."""
    before, started = set(descendants(os.getpid())), time.monotonic()
    error: ReLoRAError | None = None
    try:
        run_worker(module, request, run.scratch / "request.json", **{"on_event": ignore_event} | options)
    except ReLoRAError as raised:
        error = raised
    seconds = time.monotonic() - started
    left = set(descendants(os.getpid())) - before
    run.record(
        **{what: {"error": type(error).__name__, "message": str(error)[:600], "seconds": seconds, "left": len(left)}}
    )
    run.require(f"{what}: {type(error).__name__} is not {expected.__name__}", type(error) is expected)
    run.require(
        f"{what}: exit code {error and error.exit_code}", error is not None and error.exit_code == expected.exit_code
    )
    run.require(f"{what}: {len(left)} processes left", not left)
    run.require(f"{what}: {seconds:.0f} s", seconds < limit, device_only=True)
    return error


def ignore_event(event: Event) -> None:
    """Drop an event."""


def out_of_memory(run: Run) -> None:
    """A micro-batch of a million tokens, 17 GB in every activation."""
    if run.dry:
        run.require("a GPU runs out of memory", False, device_only=True)
        return
    shape = {"hidden_size": 4096, "intermediate_size": 4096, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 32, "max_position_embeddings": 1024}
    batch = {"sequences": 1024, "sequence_length": 1024}
    request = tiny_request(run, "warm-start", "large", model=shape, batch=batch, evaluation={"batch_sequences": 1})
    request = request.model_copy(update={"dataset_directory": large_dataset(run)})
    free = torch.cuda.mem_get_info()[0]
    failed(run, "out of memory", request, DeviceMemoryError, limit=60)
    time.sleep(1)
    run.below("bytes not given back", free - torch.cuda.mem_get_info()[0], 50e6)


def large_dataset(run: Run) -> Any:
    from tiny_data import write_tiny_dataset

    directory = run.scratch / "large-dataset"
    return write_tiny_dataset(directory, train_tokens=1024 * 1024 + 1, val_tokens=4096)


def more_ranks_than_gpus(run: Run) -> None:
    if run.dry:
        run.require("more ranks than GPUs are refused", False, device_only=True)
        return
    gpus = torch.cuda.device_count()
    request = tiny_request(run, "warm-start", "ranks", launch={"device": "cuda", "nproc_per_node": gpus + 1})
    error = failed(run, "a rank too many", request, DeviceError, limit=60, launch=LaunchConfig(nproc_per_node=gpus + 1))
    run.require("a rank too many is not tried again", error is not None and not error.retryable)


def no_gpu(run: Run) -> None:
    with environment(CUDA_VISIBLE_DEVICES=""):
        request = tiny_request(run, "warm-start", "none", launch={"device": "cuda"})
        failed(run, "device cuda without a GPU", request, DeviceError, limit=IN_TIME)
        request = tiny_request(run, "warm-start", "none", launch={"device": "auto", "nproc_per_node": "gpu"})
        failed(run, "a rank a GPU without a GPU", request, DeviceError, limit=IN_TIME, launch=request.profile.launch)


def unused_gpu(run: Run) -> None:
    """Device 'auto' falls to the CPU aloud. The GPU is hidden by a number that none has, not by an empty list."""
    program = (
        "import logging, sys; logging.basicConfig(stream=sys.stdout)\n"
        "from relora_train.distributed import process_group\n"
        "with process_group('auto') as ranks: sys.stdout.write(f'device {ranks.device}')\n"
    )
    with environment(CUDA_VISIBLE_DEVICES="99", NVIDIA_VISIBLE_DEVICES="all"):
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stdout
    run.record(**{"an unused GPU": said[-600:]})
    run.require("device 'auto' takes the CPU", "device cpu" in said)
    run.require("it says that a GPU is left unused", "Training on the CPU" in said and "NVIDIA" in said)


def killed_trainer(run: Run) -> None:
    """kill -9 while the device has work to do."""

    def kill(event: Event) -> None:
        if event["event"] == "stage_started":
            time.sleep(0.2 if run.dry else 1.0)
            os.kill(event["pid"], signal.SIGKILL)

    request = tiny_request(run, "warm-start", "killed", schedule={"warm_start_steps": 10_000_000})
    on_event: Callable[[Event], None] = kill
    error = failed(run, "a killed trainer", request, TrainerCrashedError, limit=60, on_event=on_event)
    run.require("a killed trainer may be tried again", error is not None and error.retryable)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
