"""One arm of a benchmark in a process of its own, so that its peak of memory is its own.

`python -m relora_train.experiments.bench_worker` reads a StepRequest as the first line of standard input, then the
number of steps of each round, one a line. It answers each line with a line of JSON.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from relora_train.checkpoints.manifest import DatasetManifest, describe_files
from relora_train.devices import dropout_mask_here
from relora_train.distributed import process_group
from relora_train.experiments.bench import RELORA, StepRequest
from relora_train.method.stages import plan_stages
from relora_train.training.build import prepare_stage
from relora_train.training.files import new_attempt, write_manifest
from relora_train.training.precision import settle_matmul_precision
from relora_train.training.requests import StageRequest
from relora_train.training.step import StageTraining
from relora_train.training.torch_settings import configure_torch, peak_bytes, process_bytes, reset_peak


@dataclass
class BuiltStep:
    """A model with its optimizer, and one optimizer update."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    update: Callable[[], Tensor]
    """Does one update and returns its loss, on the device."""


def main(build: Callable[[StepRequest, StageTraining], BuiltStep] | None = None) -> None:
    """Serve rounds until standard input ends. build: makes a step of your own from this library's stage."""
    request = StepRequest.model_validate_json(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as directory:
        training = prepare(request, Path(directory))
        device = training.ranks.device
        is_gpu = device.type == "cuda"
        held = torch.cuda.memory_allocated(device) if is_gpu else process_bytes("VmRSS") or 0
        built = (build or own_step)(request, training)
        built.update()  # allocates the optimizer's state and what is kept between steps
        reset_peak(device)
        _answer()
        for line in sys.stdin:
            loss, seconds = torch.zeros(()), []
            for _ in range(int(line)):
                _wait(device)
                started = time.perf_counter()
                loss = built.update()
                _wait(device)
                seconds.append(time.perf_counter() - started)
            above = (peak_bytes(device) or 0) - held  # before the product below, which is larger than a small model
            _answer(
                seconds=seconds,
                loss=float(loss),
                memory={**_memory(built), "above_weights": above},
                matmul_flops=_matmul_flops(request, device),
                device=torch.cuda.get_device_name() if is_gpu else f"cpu, {torch.get_num_threads()} threads",
                matmul_precision=torch.get_float32_matmul_precision(),
            )
            reset_peak(device)


def prepare(request: StepRequest, directory: Path) -> StageTraining:
    """Return a stage on one batch of random tokens, ready for its first update: the first cycle, or the warm start."""
    profile, dataset = request.profile, directory / "dataset"
    count = profile.batch.tokens + 1
    token_dtype: Literal["uint16", "uint32"] = "uint16" if request.vocab_size <= 1 << 16 else "uint32"
    for split in ("train", "val"):
        (dataset / split).mkdir(parents=True)
        tokens = np.random.default_rng(0).integers(0, request.vocab_size, count).astype(token_dtype)
        tokens.tofile(dataset / split / "shard-00000.bin")
    sizes = {f"{split}_{unit}": count for split in ("train", "val") for unit in ("tokens", "documents", "bytes")}
    manifest = DatasetManifest(
        files=describe_files(dataset), attempt=new_attempt(), name="bench", dataset_id="0" * 64, inputs={},
        token_dtype=token_dtype, vocab_size=request.vocab_size, eos_id=0, **sizes,
    )  # fmt: skip
    write_manifest(manifest, dataset)
    configure_torch(profile)
    with process_group(profile.launch.device) as ranks:
        training = prepare_stage(
            StageRequest(
                run_id="bench",
                profile=profile,
                stage=plan_stages(profile)[1 if request.arm == RELORA else 0],
                fingerprint="",
                fingerprint_settings={},
                dropout_mask=dropout_mask_here(profile),
                dataset_uri=dataset.as_uri(),
                dataset_id="0" * 64,
                dataset_directory=dataset,
                output_directory=directory / "output",
            ),
            ranks,
        )
    training.matmul = settle_matmul_precision(profile, training.model, training.ranks, recorded=None)
    return training


def own_step(request: StepRequest, training: StageTraining) -> BuiltStep:
    """Return this library's own step: the very function that trains."""
    steps = iter(range(training.stage.first_step, training.stage.end_step + 1))
    return BuiltStep(training.model, training.optimizer, lambda: training.update(next(steps))[0])


def _answer(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _matmul_flops(request: StepRequest, device: torch.device) -> float:
    """Return the FLOPs a second of a large square product in the profile's precision."""
    dtype = torch.float32 if request.profile.precision.dtype == "float32" else torch.bfloat16
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    taken = []
    for _ in range(3):
        _wait(device)
        started = time.perf_counter()
        matrix @ matrix
        _wait(device)
        taken.append(time.perf_counter() - started)
    return float(2 * side**3 / min(taken))


def _memory(built: BuiltStep) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer."""
    parameters = list(built.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    state = sum(
        value.numel() * value.element_size()
        for entries in built.optimizer.state.values()
        for value in entries.values()
        if isinstance(value, Tensor)
    )
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return {"weights": weights, "gradients": trained, "optimizer": state}


if __name__ == "__main__":
    main()
