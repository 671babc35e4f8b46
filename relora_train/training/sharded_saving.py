"""Checkpoints and snapshots of a sharded model: every rank gathers one tensor at a time, the first writes it.

The files are those of a whole model: any number of ranks goes on from them, sharded or not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from relora_train.distributed import SLOW, STEP, full_tensor, gather, local_shard
from relora_train.process import Emit
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
from relora_train.training.snapshot import Progress, describe_progress, moving_tensors
from relora_train.training.snapshotter import is_due, write_and_report
from relora_train.training.step import StageTraining
from relora_train.training.tensor_stream import Layout, TensorStream


def save_sharded(training: StageTraining, directory: Path | None) -> None:
    """Write model and optimizer as commit.py does for a whole model; ranks without a directory lend their rows."""
    names = _saved_names(training)
    parameters = dict(training.model.named_parameters())
    files = _files({file: (torch.float32, tuple(parameters[name].shape)) for file, name in names.items()})
    if directory is not None:
        cast(Any, training.model).save_pretrained(directory, state_dict={})  # configuration and no weights
        (directory / MODEL_FILE).unlink(missing_ok=True)
        if len(files) > 1:
            _write_index(files, directory)
    streams = {
        file: TensorStream(layout, (_exact(training, names[saved]) for saved in layout), {"format": "pt"})
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


def _saved_names(training: StageTraining) -> dict[str, str]:
    """Return the model's names by those of save_pretrained, sorted; without A and B, tied tensors once."""
    names = [name for name, _ in training.model.named_parameters()]
    kept = [name for name in names if name.rpartition(".")[2] not in ("lora_A", "lora_B")]
    return dict(sorted((file_name(training.model, name), name) for name in kept))


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


def _write_index(files: dict[str, Layout], directory: Path) -> None:
    total = sum(TensorStream(layout, iter(())).size_bytes for layout in files.values())
    weight_map = {name: file for file, layout in files.items() for name in layout}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{MODEL_FILE}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _exact(training: StageTraining, name: str) -> Tensor:
    parameter = training.model.get_parameter(name)
    if training.masters is not None and name in training.masters:
        return gather(training.masters[name], parameter)
    return full_tensor(parameter)


def _optimizer_stream(training: StageTraining) -> TensorStream:
    """Return Adam's state in the form of save_optimizer_state; entries are counted, then gathered and encoded."""
    state = optimizer_state_by_name(training.optimizer, training.model)
    tensors = {f"{name}.{key}": value for name, entries in state.items() for key, value in entries.items()}
    counts = torch.tensor([_own_nonzero(training, value) for value in tensors.values()], device=training.ranks.device)
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


def _own_nonzero(training: StageTraining, value: Tensor) -> int:
    """Count the entries of this rank's rows; a tensor that every rank holds (Adam's step) counts on the first."""
    is_part = local_shard(value) is not value
    return int(local_shard(value).count_nonzero()) if is_part or training.ranks.is_first else 0


class ShardedSnapshotter:
    """The Snapshotter of a sharded training. All ranks save together, and training waits until the file is written."""

    def __init__(self, training: StageTraining, emit: Emit) -> None:
        self._training, self._emit = training, emit
        self._root: Path | None = training.request.snapshots_directory
        self._last = time.monotonic()
        self._saved_step = -1

    def after_step(self, progress: Progress) -> None:
        """Make a snapshot if the first rank finds that one is due."""
        if self._root is None:
            return
        settings, ranks = self._training.profile.snapshots, self._training.ranks
        since = time.monotonic() - self._last
        if ranks.any(ranks.is_first and is_due(settings, step=progress.step, seconds_since_last=since)):
            self._save(self._root, progress)

    def at_stop(self, progress: Progress) -> bool:
        """Save this very step, unless that was done already; True, on the first rank, when it is on the disk."""
        if self._root is not None and not self._training.ranks.any(self._saved_step == progress.step):
            self._save(self._root, progress)
        return self._saved_step == progress.step

    def wait(self) -> None:
        """Nothing is ever being written between two steps."""

    def _save(self, root: Path, progress: Progress) -> None:
        self._last = time.monotonic()
        if not math.isfinite(float(progress.losses)):  # diverged: the next record will say so. The same on all ranks
            return
        tensors = moving_tensors(self._training)
        layout: Layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        stream = TensorStream(layout, (full_tensor(tensor) for tensor in tensors.values()))
        ranks = self._training.ranks
        ranks.expect_answers_within(SLOW)
        if ranks.is_first:
            state = describe_progress(self._training, progress)
            if write_and_report(self._training, self._emit, root, state, stream, list(progress.metrics)):
                self._saved_step = progress.step
        stream.finish()  # also what a full disk left over: the other ranks are at it
        ranks.barrier()  # the file is on the disk
        ranks.expect_answers_within(STEP)
