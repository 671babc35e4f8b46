"""Training state <-> a checkpoint directory, as design §4 lists its files. The manifest is written last."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from relora_train.config import FrozenConfig
from relora_train.errors import CheckpointCorruptError, CheckpointIncompleteError
from relora_train.manifest import MANIFEST_NAME, Manifest

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"
METRICS_FILE = "metrics.jsonl"
PROFILE_FILE = "profile.json"
ADAPTER_DIRECTORY = "adapter"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MAX_SHARD_SIZE = "5GB"

_DENSE_ABOVE = 0.5  # share of kept entries from which index and value cost more than the dense tensor
_PACKAGES = ("relora-train", "torch", "transformers", "tokenizers", "safetensors", "numpy", "prefect")

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> {'step', 'exp_avg', 'exp_avg_sq'}."""


class TrainingState(FrozenConfig):
    """Where a run stands. Random numbers need no state: every draw is a function of seed, step and name."""

    step: int = Field(ge=0)
    """Updates done."""

    cycle: int = Field(ge=0)
    """Merges done."""

    stage_kind: str
    """Kind of the stage that ended here; its optimizer state is handed on within the same kind only."""

    tokens_seen: int = Field(ge=0)
    samples_seen: int = Field(ge=0)
    """Data position in sequences of dataset_id."""

    dataset_id: str
    seed: int
    schedule: dict[str, Any]
    """The profile's schedule, for people."""

    evaluation: dict[str, float] = Field(default_factory=dict)
    """Validation loss of these weights."""

    evaluation_key: str = ""
    """Digest of what the evaluation depends on beside the weights: with the same key it need not be repeated."""


def save_model(model: nn.Module, directory: Path, *, weights: Mapping[str, Tensor]) -> None:
    """Write weights and configuration as `save_pretrained` does, under Hugging Face names, in float32.

    weights: the model's state without lora_A and lora_B, already merged. Tied weights are written once.
    """
    unexpected = [
        name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    if unexpected:
        raise CheckpointCorruptError(
            f"{unexpected[0]} is {weights[unexpected[0]].dtype}; checkpoints hold float32 only."
        )
    cast(Any, model).save_pretrained(directory, state_dict=dict(weights), max_shard_size=MAX_SHARD_SIZE)


def read_tensor(directory: Path, name: str) -> Tensor | None:
    """One tensor of a checkpoint's model, sharded or not, or None when it holds none of that name."""
    index = directory / f"{MODEL_FILE}.index.json"
    file = MODEL_FILE
    if index.is_file():
        file = json.loads(index.read_text())["weight_map"].get(name, "")
    if not (directory / file).is_file():
        return None
    with safe_open(directory / file, framework="pt") as tensors:
        return cast(Tensor, tensors.get_tensor(name)) if name in tensors.keys() else None  # noqa: SIM118 (no __contains__)


def save_optimizer_state(state: OptimizerState, path: Path) -> None:
    """Write Adam's state; a moment with at most half its entries non-zero as int32 flat index and float32 value.

    Reads back bit for bit, except that a pruned negative zero becomes zero.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for parameter, entries in state.items():
        for key, value in entries.items():
            name = f"{parameter}.{key}"
            tensor = value.detach().cpu().contiguous()
            kept = np.flatnonzero(tensor.numpy()) if tensor.ndim and tensor.numel() < 2**31 else None
            if kept is None or len(kept) > _DENSE_ABOVE * tensor.numel():
                tensors[name] = tensor
                continue
            index = torch.from_numpy(kept.astype(np.int32))
            tensors[f"{name}.idx"], tensors[f"{name}.val"] = index, tensor.flatten()[index.long()]
            shapes[name] = list(tensor.shape)
    # One metadata key only: safetensors writes several in random order.
    save_file(tensors, path, metadata={"sparse_shapes": json.dumps(shapes, sort_keys=True)})


def load_optimizer_state(path: Path) -> OptimizerState:
    """What `save_optimizer_state` wrote."""
    state: OptimizerState = {}
    with safe_open(path, framework="pt") as tensors:
        shapes: dict[str, list[int]] = json.loads((tensors.metadata() or {}).get("sparse_shapes", "{}"))
        dense = [key for key in tensors.keys() if not key.endswith((".idx", ".val"))]  # noqa: SIM118 (not a dict)
        for name in dense:
            _place(state, name, tensors.get_tensor(name))
        for name, shape in shapes.items():
            values = tensors.get_tensor(f"{name}.val")
            tensor = torch.zeros(shape, dtype=values.dtype)
            tensor.view(-1)[tensors.get_tensor(f"{name}.idx").long()] = values
            _place(state, name, tensor)
    return state


def _place(state: OptimizerState, name: str, tensor: Tensor) -> None:
    parameter, _, key = name.rpartition(".")
    state.setdefault(parameter, {})[key] = tensor


def save_adapter(tensors: Mapping[str, Tensor], config: Mapping[str, Any], directory: Path) -> None:
    """Write A and B as a PEFT adapter in a directory of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Put the dataset's tokenizer beside the weights."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, directory / name)


def write_metrics(records: list[dict[str, Any]], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_training_state(directory: Path) -> TrainingState:
    """Step and data position of a checkpoint."""
    path = directory / STATE_FILE
    try:
        return TrainingState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointIncompleteError(f"{path} is missing; resume from another checkpoint.") from None
    except ValueError as error:
        raise CheckpointCorruptError(f"{path} is damaged ({error}); resume from another checkpoint.") from None


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Commit a directory: all of the manifest appears at once, after everything it names."""
    temporary = directory / f".{MANIFEST_NAME}.tmp"
    temporary.write_bytes(manifest.to_bytes())
    temporary.rename(directory / MANIFEST_NAME)


def new_attempt() -> str:
    """A random name for one attempt at a commit."""
    return secrets.token_hex(8)


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
