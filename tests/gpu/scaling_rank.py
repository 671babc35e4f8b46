"""One rank of C4, `python -m scaling_rank --request FILE`: updates of a stage, and their share for the other ranks."""

import dataclasses
import time
from pathlib import Path

import torch
from check_run import Run
from speed import stepper
from stages import made_on
from timing import kernels_of, timed

from relora_train.distributed import process_group
from relora_train.process import Emit, serve_request
from relora_train.training.build import prepare_stage
from relora_train.training.requests import StageRequest
from relora_train.training.torch_settings import configure_torch, process_bytes


def measure(request: StageRequest, emit: Emit) -> None:
    launch = request.profile.launch
    with process_group(launch.device) as ranks:
        ranks = dataclasses.replace(ranks, sharded=launch.sharding == "full" and ranks.world_size > 1)
        run = Run(tell=lambda values: None, device_type=ranks.device.type, scratch=Path(), shared=Path())
        configure_torch(request.profile)
        with made_on(torch.device("cpu") if ranks.sharded else ranks.device):
            training = prepare_stage(request, ranks)
        training.masters = None
        host_bytes = process_bytes("VmHWM")
        step = stepper(training)
        timing = timed(run, step)
        kernels = kernels_of(run, step)
        found = {
            "rank": ranks.rank,
            "tokens_per_second_a_rank": request.profile.batch.tokens / ranks.world_size / timing.seconds,
            **timing.as_record(),
            "nccl_ms": sum(ms for name, ms, _ in kernels.by_name if "nccl" in name.lower()),
            "exposed_nccl_ms": kernels.exposed_ms,
            "host_bytes_at_load": host_bytes,
            "peak_bytes": None if run.dry else torch.cuda.max_memory_allocated(),
        }
        started = time.perf_counter()
        for _ in range(20):
            ranks.any(False)
        found["any_ms"] = 50 * (time.perf_counter() - started)
        emit("scaled", **found)
        ranks.barrier()


if __name__ == "__main__":
    serve_request(StageRequest, measure)
