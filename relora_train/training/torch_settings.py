"""Settings of a process that decide numbers and speed, and what a finished piece of work leaves in it."""

from __future__ import annotations

import gc
import json
import os
import sys

import torch
from torch import nn

from relora_train.distributed import Ranks
from relora_train.settings.profile import Profile
from relora_train.training.matmul_probe import Choice, MatmulPrecision, products_of, settle
from relora_train.training.models.registry import facts_of


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


def settle_matmul_precision(
    profile: Profile, model: nn.Module, ranks: Ranks, *, recorded: MatmulPrecision | None
) -> Choice | None:
    """Set what precision.matmul_precision = 'auto' stands for in this run, the same on all ranks; None for the others.

    recorded: what the parent or the snapshot says that the run computes with. For float32 only: under autocast the
    products are in bfloat16 whatever this is.
    """
    if profile.precision.matmul_precision != "auto":
        return None
    found: Choice | None = None
    if profile.precision.computes_in_bfloat16:
        found = Choice("highest", "products are in bfloat16")
    elif ranks.is_first:
        rows = profile.batch.forward_passes(ranks.world_size)[0] * facts_of(profile).rows_per_sequence()
        found = settle(products_of(model, rows=rows), ranks.device, recorded=recorded)
    choice = Choice(*json.loads(ranks.share_text(json.dumps(found))))
    torch.set_float32_matmul_precision(choice.precision)
    return choice


def release_memory() -> None:
    """Free the model, the optimizer and the compiled code of work that has ended: they hold one another in cycles."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
