"""One arm of a benchmark in a process of its own, so that its peak of memory is its own.

`python -m relora_train.experiments.benchmark.worker` reads an ArmRequest as the first line of standard input, then the
number of steps of each round, one a line; it answers each with a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from relora_train.experiments.benchmark.arms import BuiltArm, build_arm
from relora_train.experiments.benchmark.request import ArmRequest
from relora_train.training.matmul_probe import products_of, settle
from relora_train.training.peak_memory import peak_bytes, process_bytes, reset_peak

_PEAK_SIDE = 2048


def main() -> None:
    """Serve rounds until standard input ends."""
    request = ArmRequest.model_validate_json(sys.stdin.readline())
    if request.matmul_precision != "auto":
        torch.set_float32_matmul_precision(request.matmul_precision)
    if request.threads:
        torch.set_num_threads(request.threads)
    wants_gpu = request.device == "cuda" or (request.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if wants_gpu else "cpu")
    before = process_bytes("VmRSS") or 0
    built = build_arm(request, device)
    shape = request.shape
    if request.matmul_precision == "auto":
        choice = settle(products_of(built.model, rows=shape.tokens), device, recorded=None)
        torch.set_float32_matmul_precision(choice.precision)
        chosen = f"{choice.precision} ({choice.reason})"
    else:
        chosen = request.matmul_precision
    torch.manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (shape.sequences, shape.sequence_length + 1), device=device)
    first = float(built.step(tokens))  # allocates the optimizer's state and what is kept between steps
    reset_peak(device)
    _answer(
        arm=request.arm,
        device=torch.cuda.get_device_name() if wants_gpu else "cpu",
        threads=torch.get_num_threads(),
        flops_per_token=built.flops_per_token,
        notes=built.notes,
        matmul_precision=chosen,
        first_loss=first,
    )
    for line in sys.stdin:
        loss, seconds = torch.zeros(()), []
        for _ in range(int(line)):
            _wait(device)
            started = time.perf_counter()
            loss = built.step(tokens)
            _wait(device)
            seconds.append(time.perf_counter() - started)
        peak_flops = _matmul_flops(request, device)
        memory = _memory(built, device, before)
        _answer(seconds=seconds, loss=float(loss), matmul_flops=peak_flops, memory=memory)


def _answer(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _matmul_flops(request: ArmRequest, device: torch.device) -> float:
    """FLOPs a second of a large square product in the arm's precision: what utilisation is measured against."""
    dtype = torch.bfloat16 if request.precision == "bfloat16" else torch.float32
    side = _PEAK_SIDE * (4 if device.type == "cuda" else 1)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    taken = []
    for _ in range(3):
        _wait(device)
        started = time.perf_counter()
        matrix @ matrix
        _wait(device)
        taken.append(time.perf_counter() - started)
    return float(2 * side**3 / min(taken))


def _memory(built: BuiltArm, device: torch.device, before: int) -> dict[str, int]:
    """Bytes: of the weights, of the optimizer's state, and the peak of all but the weights."""
    weights = sum(p.numel() * p.element_size() for p in built.model.parameters())
    state = sum(
        value.numel() * value.element_size()
        for entries in built.optimizer.state.values()
        for value in entries.values()
        if isinstance(value, torch.Tensor)
    )
    trained = sum(p.numel() * p.element_size() for p in built.model.parameters() if p.requires_grad)
    peak = (peak_bytes(device) or 0) - (0 if device.type == "cuda" else before)
    return {"weights": weights, "optimizer": state, "gradients": trained, "above_weights": peak - weights}


if __name__ == "__main__":
    main()
