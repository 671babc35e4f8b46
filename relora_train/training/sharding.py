"""A model of which every rank holds some rows of every tensor: torch's FSDP2, filled without any rank holding it whole.

Before a block's forward and backward pass its tensors are gathered on all ranks, and given up after it; gradients are
summed over the ranks and scattered by rows in every backward pass. So a rank's device holds 1 / world_size of weights,
gradients and optimizer, one block, and the embedding and head together.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from relora_train.distributed import Ranks, local_shard, own_rows
from relora_train.errors import CheckpointCorruptError, ModelError
from relora_train.training.files import read_tensor, stored_shapes
from relora_train.training.models.model import blocks, file_name, fused_loss
from relora_train.training.models.pretrained import check_tensors

RowsOf = Callable[[Sequence[str], Tensor], Tensor]
"""The rows that this rank holds of a tensor, from the names the model has for it, and the tensor they are for."""


def rows_of_checkpoint(directory: Path, model: nn.Module) -> RowsOf:
    """Read from the files of such a model nothing but this rank's rows. ModelUnsuitableError where they do not fit."""
    stored = stored_shapes(directory)
    missing, mismatched, unexpected = [], [], {*stored} - {name for name, _ in model.named_buffers()}
    for name, aliases in _names_of_parameters(model).items():
        found = [file for file in (file_name(model, alias) for alias in aliases) if file in stored]
        if not found:
            missing.append(name)
        elif stored[found[0]] != tuple(model.get_parameter(name).shape):
            mismatched.append(name)
        unexpected -= {*found[:1]}  # files must hold one of tied tensors
    check_tensors(directory, missing, mismatched, [*unexpected])

    def rows(names: Sequence[str], like: Tensor) -> Tensor:
        for name in names:  # of tied tensors, files hold one
            found = read_tensor(directory, file_name(model, name), rows=own_rows(like))
            if found is not None:
                return found
        raise CheckpointCorruptError(f"{directory} holds no tensor {names[0]}; resume from another checkpoint.")

    return rows


@torch.no_grad()
def shard_model(model: nn.Module, rows_of: RowsOf, ranks: Ranks, *, bfloat16: bool = False) -> None:
    """Make a skeleton (all tensors on the meta device) this rank's part of the model; A and B stay undrawn.

    bfloat16: blocks are sent rounded, and compute with what was sent. Gradients are summed in float32.

    Raises ModelError for a model whose blocks or buffers are unknown.
    """
    names = _names_of_parameters(model)
    files = {name: file_name(model, name) for aliases in names.values() for name in aliases}
    cast(Any, model).file_names = files  # transformers finds them by the class, and FSDP makes another class
    _fully_shard(model, ranks, bfloat16)
    model.to_empty(device=ranks.device)
    for module in model.modules():  # rotary frequencies and the like, which no file holds, as transformers makes them
        buffers = dict(module.named_buffers(recurse=False))
        for buffer in buffers.values():
            if buffer.is_floating_point():
                buffer.fill_(float("nan"))
        if buffers:
            cast(Any, model)._init_weights(module)
        for name, buffer in buffers.items():
            in_files = name not in module._non_persistent_buffers_set
            if in_files or not buffer.is_floating_point() or buffer.isnan().any():
                raise ModelError(
                    f"{type(module).__name__}.{name} cannot be made anew from the configuration of a "
                    f"{type(model).__name__}. Use launch.sharding = 'none'."
                )
    parameters = dict(model.named_parameters())
    for name, aliases in names.items():
        local_shard(parameters[name]).copy_(rows_of(aliases, parameters[name]))


def _names_of_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each parameter that files hold, by its first: A and B are drawn."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[2] not in ("lora_A", "lora_B"):
            by_id.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in by_id.values()}


def _fully_shard(model: nn.Module, ranks: Ranks, bfloat16: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    parts = blocks(model)
    if not parts:
        raise ModelError(
            f"transformers does not say which modules are the blocks of a {type(model).__name__}, so launch.sharding = "
            "'full' would gather it whole. Use launch.sharding = 'none'."
        )
    # Sharding rounds neither the stream between the blocks nor embedding and head.
    exact = MixedPrecisionPolicy()
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*parts, model):
        # Also what is left beside the blocks, embedding and head, is given up after a forward pass.
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=rounded if bfloat16 and module is not model else exact,
        )
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)  # a sum: every rank's loss is its share of the batch's
        sharded.set_force_sum_reduction_for_comms(True)
    cast(Any, model).fused_loss = MethodType(fused_loss, model)
    register_fsdp_forward_method(model, "fused_loss")
