"""torch.compile for training: every block of a model by one graph. Evaluation and probes stay as they are written."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as functorch
from torch import nn

from relora_train.errors import DeviceError
from relora_train.method.fast_path import join_siblings
from relora_train.training.models.chunked_loss import loss_of_rows
from relora_train.training.models.model import blocks

_LOGGER = logging.getLogger(__name__)


def compile_blocks(model: nn.Module, *, recompute: bool = True, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the blocks in place: names of modules and tensors stay, and equal blocks share one graph.

    A graph is made at the first update of a stage, and again only for a micro-batch of another shape; weights may
    change in place. recompute: keep what products and attention made for the backward pass, and make the rest again.
    """
    functorch.aggressive_recomputation = recompute
    # Siblings hand each other their outputs, which no graph sees: a checkpointed block need not do so once more.
    dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    join_siblings(model)
    for block in blocks(model) or [cast(Any, model).base_model]:
        block.compile(dynamic=False, backend=backend)
    cast(Any, model).loss_of_rows = torch.compile(loss_of_rows, dynamic=False, backend=backend)


def can_compile(device: torch.device, *, required: bool) -> bool:
    """Return True if torch.compile works here, by a try: compiler, headers and writable cache are not torch's to bring.

    If it does not, raise DeviceError if it is required, and warn otherwise.
    """
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever the tool chain raises
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        if not required:
            _LOGGER.warning("Training without torch.compile, which does not work on this machine (%s).", reason)
            return False
        raise DeviceError(
            f"launch.compile is on, but torch.compile does not work on this machine ({reason}). It needs a C++ "
            "compiler such as g++ on a CPU, Triton and a C compiler on a GPU. Install them, or set launch.compile to "
            "false: results differ by rounding only."
        ) from error
    return True


def without_compiling() -> AbstractContextManager[Any]:
    """Compiled modules run as they are written: for batches of ever other shapes, which would each take a graph."""
    return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
