"""Settings of a process that decide numbers and speed, and what a finished piece of work leaves in it."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import AbstractContextManager, nullcontext
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
