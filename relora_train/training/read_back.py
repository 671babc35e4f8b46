"""Compare a checkpoint's files with what was trained before it counts: every tensor, value by value, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from relora_train.distributed import full_tensor, gather
from relora_train.errors import CheckpointCorruptError, ModelError
from relora_train.training.files import read_tensor, stored_shapes
from relora_train.training.models.model import file_name
from relora_train.training.step import StageTraining


def check_written(training: StageTraining, directory: Path | None) -> None:
    """Raise CheckpointCorruptError unless whoever loads the directory gets the very model that was trained.

    All ranks of a sharded training call together; those without a directory lend their rows. Only where transformers
    writes tensors in another form than it holds (experts one by one, say) is the directory loaded as a second model.
    """
    model = training.model
    masters: Mapping[str, Tensor] = training.masters or {}
    # Each tied tensor of a sharded model is gathered once; in a whole model both names are looked at.
    tensors = dict(model.named_parameters()) if training.ranks.sharded else model.state_dict()
    held = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in ("lora_A", "lora_B")}
    loaded: dict[str, Tensor] = {}
    try:
        files = {name: file_name(model, name) for name in held}
    except ModelError:
        files, loaded = {name: name for name in held}, training.objective.load_model(cast(Path, directory)).state_dict()
    if directory is not None and not loaded:
        files = _stored_names(directory, files, training.objective.load_skeleton(directory))
    for name, tensor in held.items():
        trained = full_tensor(tensor)
        exact = gather(masters[name], tensor) if name in masters else trained
        if directory is None:
            continue
        found = loaded[name] if loaded else read_tensor(directory, files[name])
        written = exact.float() if exact.is_floating_point() else exact
        rounded = found is None or exact is trained or _same(found.to(trained.dtype), trained)
        if found is None or not (rounded and _same(found, written)):
            raise _unequal(directory, f"{name} was not read back as it was trained")


def _stored_names(directory: Path, files: dict[str, str], skeleton: nn.Module) -> dict[str, str]:
    """Return the tensor in the files that the loader takes for each name: of tied ones, any that is there."""
    stored = stored_shapes(directory)
    by_id: dict[int, list[str]] = {}
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        by_id.setdefault(id(tensor), []).append(files.get(name, name))
    tied = {file: [other for other in group if other in stored] for group in by_id.values() for file in group}
    taken = {name: file if file in stored else next(iter(tied.get(file, ())), "") for name, file in files.items()}
    if missing := [name for name, file in taken.items() if not file]:
        raise _unequal(directory, f"{missing[0]} was not written")
    if extra := sorted({*stored} - {*taken.values()}):
        raise _unequal(directory, f"{extra[0]} was written and is no part of the model")
    return taken


def _same(found: Tensor, expected: Tensor) -> bool:
    """Return True if they are the same bit for bit, so also where a value is no number."""
    expected = expected.detach().cpu().contiguous()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    bits = torch.int32 if found.element_size() == 4 else torch.uint8
    return torch.equal(found.contiguous().view(-1).view(bits), expected.view(-1).view(bits))


def _unequal(directory: Path, what: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{what} in {directory}: nothing of this stage was committed. Either the disk is damaged there, or "
        "transformers writes this model in another form than it loads. Check the disk and run the same command again; "
        "if it comes again, please report it with the model's config.json."
    )
