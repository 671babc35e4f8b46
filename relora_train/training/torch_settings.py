"""A process: the settings that decide numbers and speed, and the memory that it holds and frees."""

import gc
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from relora_train.settings.profile import Profile
from relora_train.settings.running import PrecisionConfig


def configure_torch(profile: Profile) -> None:
    """Bring the process into the same state whatever ran in it before; every piece of work begins with it.

    Other settings of device, threads or precision than those of the work before need another process.
    """
    torch.manual_seed(profile.seed)  # whatever draws without a seed of its own draws the same in every process
    chosen = profile.precision.matmul_precision
    torch.set_float32_matmul_precision("highest" if chosen == "auto" else chosen)
    if profile.launch.threads:
        torch.set_num_threads(profile.launch.threads)
    if profile.precision.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast(precision: PrecisionConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which forward passes of a profile run."""
    if precision.computes_in_bfloat16:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def release_memory() -> None:
    """Free the model, the optimizer and the compiled code of work that has ended: they hold one another in cycles."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Count anew from what is held now. If the system cannot do that for a CPU, the peak stays the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Return the bytes; None if the system does not tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_bytes("VmHWM")


def device_name(device: torch.device) -> str:
    """Return 'NVIDIA H200', or a CPU's model and how many cores of it this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def process_bytes(field: str) -> int | None:
    """Return a size in bytes that Linux tells of this process, such as VmRSS, the memory that is resident now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
