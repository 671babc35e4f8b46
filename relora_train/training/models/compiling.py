"""torch.compile for training: every block of a model by one graph. Evaluation and probes stay as they are written."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn

from relora_train.errors import DeviceError
from relora_train.training.models.model import blocks


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks in place: names of modules and tensors stay, and equal blocks share one graph.

    A graph is made at the first update of a stage, and again only for a micro-batch of another shape; weights may
    change in place. Dropout draws other masks than without. Raises DeviceError where torch cannot compile.
    """
    try:  # now, before the stage begins: torch does not bring the compiler, headers and writable cache that it needs
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=next(model.parameters()).device))
    except Exception as error:  # whatever the tool chain raises
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DeviceError(
            f"launch.compile is on, but torch.compile does not work on this machine ({reason.strip()}). It needs a C++ "
            "compiler such as g++ on a CPU, Triton and a C compiler on a GPU. Install them, or set launch.compile to "
            "false: results differ by rounding only."
        ) from error
    for block in blocks(model) or [cast(Any, model).base_model]:
        block.compile(dynamic=False)


def without_compiling() -> AbstractContextManager[Any]:
    """Compiled modules run as they are written: for batches of ever other shapes, which would each take a graph."""
    return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
