"""Checkpoints of a sharded model: every rank gathers one tensor at a time, the first writes it.

The files are those of a whole model: any number of ranks goes on from them, sharded or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from relora_train.distributed import full_tensor, gather, local_shard
from relora_train.training.files import (
    MAX_SHARD_BYTES,
    MODEL_FILE,
    OPTIMIZER_FILE,
    index_and_values,
    is_written_sparse,
    sparse_shapes,
)
from relora_train.training.models.model import file_name
from relora_train.training.optimizer import optimizer_state_by_name
from relora_train.training.step import StageTraining
from relora_train.training.tensor_stream import Layout, TensorStream


def save_sharded(training: StageTraining, directory: Path | None) -> None:
    """Write model and optimizer as commit.py does for a whole model; ranks without a directory lend their rows."""
    parameters = dict(training.model.named_parameters())
    kept = [name for name in parameters if name.rpartition(".")[2] not in ("lora_A", "lora_B")]
    names = dict(sorted((file_name(training.model, name), name) for name in kept))  # the model's by the files'
    files = _files({file: (torch.float32, tuple(parameters[name].shape)) for file, name in names.items()})
    if directory is not None:
        cast(Any, training.model).save_pretrained(directory, state_dict={})  # configuration and no weights
        (directory / MODEL_FILE).unlink(missing_ok=True)
        if len(files) > 1:
            total = sum(TensorStream(layout, iter(())).size_bytes for layout in files.values())
            weight_map = {name: file for file, layout in files.items() for name in layout}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / f"{MODEL_FILE}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def exact(name: str) -> Tensor:
        if training.masters is not None and name in training.masters:
            return gather(training.masters[name], parameters[name])
        return full_tensor(parameters[name])

    streams = {
        file: TensorStream(layout, (exact(names[saved]) for saved in layout), {"format": "pt"})
        for file, layout in files.items()
    }
    handed_on = training.stage.keeps_optimizer
    streams[OPTIMIZER_FILE] = (
        _optimizer_stream(training) if handed_on else TensorStream({}, iter(()), sparse_shapes({}))
    )
    for file, stream in streams.items():
        if directory is None:
            stream.finish()
        else:
            stream.write(directory / file)


def _files(layout: Layout) -> dict[str, Layout]:
    """Divide the tensors among files: no file above the limit but for a single tensor."""
    groups: list[Layout] = [{}]
    for name, entry in layout.items():
        groups[-1][name] = entry
        if len(groups[-1]) > 1 and TensorStream(groups[-1], iter(())).size_bytes > MAX_SHARD_BYTES:
            del groups[-1][name]
            groups.append({name: entry})
    if len(groups) == 1:
        return {MODEL_FILE: groups[0]}
    stem, count = MODEL_FILE.removesuffix(".safetensors"), len(groups)
    return {f"{stem}-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _optimizer_stream(training: StageTraining) -> TensorStream:
    """Return Adam's state in the form of save_optimizer_state; entries are counted, then gathered and encoded."""
    state = optimizer_state_by_name(training.optimizer, training.model)
    tensors = {f"{name}.{key}": value for name, entries in state.items() for key, value in entries.items()}
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=training.ranks.device)
    for i, value in enumerate(tensors.values()):
        own = local_shard(value)
        if own is not value or training.ranks.is_first:  # a tensor that every rank holds (Adam's step) counts once
            counts[i] = own.count_nonzero()
    training.ranks.sum(counts)
    layout: Layout = {}
    shapes: dict[str, list[int]] = {}
    for (name, value), count in zip(tensors.items(), counts.tolist(), strict=True):
        if is_written_sparse(value.shape, count):
            layout[f"{name}.idx"], layout[f"{name}.val"] = (torch.int32, (count,)), (value.dtype, (count,))
            shapes[name] = list(value.shape)
        else:
            layout[name] = (value.dtype, tuple(value.shape))

    def encoded() -> Iterator[Tensor]:
        for name, value in tensors.items():
            full = full_tensor(value).cpu()
            if name in shapes:
                yield from index_and_values(full)
            else:
                yield full

    return TensorStream(layout, encoded(), sparse_shapes(shapes))
