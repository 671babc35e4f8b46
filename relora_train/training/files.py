"""Training state <-> a checkpoint directory, as design §4 lists its files. The manifest is written last."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from pydantic import ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from relora_train.checkpoints.manifest import MANIFEST_NAME, Manifest
from relora_train.data.tokenizer_files import TOKENIZER_FILES
from relora_train.errors import CheckpointCorruptError, CheckpointIncompleteError
from relora_train.settings.base import FrozenConfig

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"
METRICS_FILE = "metrics.jsonl"
PROFILE_FILE = "profile.json"
ADAPTER_DIRECTORY = "adapter"
COMPANION_FILES = (*TOKENIZER_FILES, "preprocessor_config.json")
MAX_SHARD_BYTES = 5 * 10**9

_ADAPTER_README = """\
# The low-rank update that this stage merged

A record of what the stage learned, for `relora analyze`: A and B of each wrapped layer, in PEFT's format. Do not load
it into a model to use it:

- The checkpoint in the directory above has the update in its weights already; there it would count twice.
- The checkpoint that the stage began from lacks what was trained beside A and B: embeddings, norms, biases and head.
  `base_model_name_or_path` in adapter_config.json, and `parent` in manifest.json, name that checkpoint.

`relora export CHECKPOINT DIR --as-adapter` writes an adapter that is right on the checkpoint the stage began from.
"""
_DENSE_ABOVE = 0.5  # share of kept entries from which index and value cost more than the dense tensor
_PACKAGES = ("relora-train", "torch", "transformers", "tokenizers", "safetensors", "numpy", "prefect")

V = TypeVar("V")
OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> {'step', 'exp_avg', 'exp_avg_sq'}."""


class TrainingState(FrozenConfig):
    """The state of a run. Random numbers need none: every draw is a function of seed, step and name."""

    model_config = ConfigDict(extra="ignore")  # states from before 1a88187 also hold a layer_ranks

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

    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """The precision that precision.matmul_precision = 'auto' stands for in this run."""


class LazyMapping(Mapping[str, V]):
    """Values by name, each read when it is asked for and every time."""

    def __init__(self, names: Iterable[str], read: Callable[[str], V]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> V:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_model(model: nn.Module, directory: Path, *, weights: Mapping[str, Tensor]) -> None:
    """Write weights and configuration as `save_pretrained` does, under Hugging Face names, in float32.

    weights: the model's state without lora_A and lora_B, already merged. Tied weights are written once.
    """
    from transformers.utils.logging import disable_progress_bar

    unexpected = [
        name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    if unexpected:
        raise CheckpointCorruptError(
            f"{unexpected[0]} is {weights[unexpected[0]].dtype}; checkpoints hold float32 only."
        )
    disable_progress_bar()
    cast(Any, model).save_pretrained(directory, state_dict=dict(weights), max_shard_size=MAX_SHARD_BYTES)
    _name_float32(directory / "config.json")


def _name_float32(path: Path) -> None:
    """save_pretrained writes the dtype of the model in memory, and from_pretrained would round to it."""
    config = json.loads(path.read_text())
    if config.get("dtype") != "float32":
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def read_tensor(directory: Path, name: str, *, rows: slice | None = None) -> Tensor | None:
    """Return one tensor of a checkpoint's model, or these rows of it; None if it holds none of that name."""
    index = directory / f"{MODEL_FILE}.index.json"
    file = MODEL_FILE
    if index.is_file():
        file = json.loads(index.read_text())["weight_map"].get(name, "")
    if not (directory / file).is_file():
        return None
    with safe_open(directory / file, framework="pt") as tensors:
        if name not in tensors.keys():  # noqa: SIM118 (no __contains__)
            return None
        return cast(Tensor, tensors.get_tensor(name) if rows is None else tensors.get_slice(name)[rows])


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint's model by name, without reading values."""
    index = directory / f"{MODEL_FILE}.index.json"
    files = sorted({*json.loads(index.read_text())["weight_map"].values()}) if index.is_file() else [MODEL_FILE]
    found = {}
    for file in files:
        with safe_open(directory / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no dict)
                found[name] = tuple(tensors.get_slice(name).get_shape())
    return found


def save_optimizer_state(state: OptimizerState, path: Path) -> None:
    """Write Adam's state in float32; a moment with at most half its entries non-zero as int32 flat index and value.

    Reads back bit for bit, except that a pruned negative zero becomes zero.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for parameter, entries in state.items():
        for key, value in entries.items():
            name = f"{parameter}.{key}"
            tensor = value.detach().cpu().float().contiguous()  # exact for bfloat16
            if is_written_sparse(tensor.shape, int(tensor.count_nonzero())):
                tensors[f"{name}.idx"], tensors[f"{name}.val"] = index_and_values(tensor)
                shapes[name] = list(tensor.shape)
            else:
                tensors[name] = tensor
    save_file(tensors, path, metadata=sparse_shapes(shapes))


def is_written_sparse(shape: torch.Size, nonzero: int) -> bool:
    """Return True if index and value of the entries that are not zero cost less than the dense tensor."""
    return len(shape) > 0 and shape.numel() < 2**31 and nonzero <= _DENSE_ABOVE * shape.numel()


def index_and_values(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int32 flat index of the entries that are not zero, and these entries."""
    index = torch.from_numpy(np.flatnonzero(tensor.numpy()).astype(np.int32))
    return index, tensor.flatten()[index.long()]


def sparse_shapes(shapes: Mapping[str, list[int]]) -> dict[str, str]:
    """Return the metadata of an optimizer's file. One key only: safetensors writes several in random order."""
    return {"sparse_shapes": json.dumps(shapes, sort_keys=True)}


class SavedOptimizerState(Mapping[str, dict[str, Tensor]]):
    """The state that `save_optimizer_state` wrote, read from the disk on demand, one parameter at a time."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")
        file: Any = self._file
        self._sparse: dict[str, list[int]] = json.loads((file.metadata() or {}).get("sparse_shapes", "{}"))
        dense = [key for key in file.keys() if not key.endswith((".idx", ".val"))]  # noqa: SIM118 (not a dict)
        self._keys: dict[str, list[str]] = {}
        for name in (*dense, *self._sparse):
            parameter, _, key = name.rpartition(".")
            self._keys.setdefault(parameter, []).append(key)

    def shape_of(self, parameter: str) -> torch.Size:
        """Return the shape of its moments, without reading them."""
        name = f"{parameter}.exp_avg"
        return torch.Size(self._sparse[name] if name in self._sparse else self._file.get_slice(name).get_shape())

    def __getitem__(self, parameter: str) -> dict[str, Tensor]:
        return {key: self._read(f"{parameter}.{key}") for key in self._keys[parameter]}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _read(self, name: str) -> Tensor:
        if name not in self._sparse:
            return cast(Tensor, self._file.get_tensor(name))
        values = self._file.get_tensor(f"{name}.val")
        tensor = torch.zeros(self._sparse[name], dtype=values.dtype)
        tensor.view(-1)[self._file.get_tensor(f"{name}.idx").long()] = values
        return tensor


def load_optimizer_state(path: Path) -> OptimizerState:
    """Return all that `save_optimizer_state` wrote."""
    return dict(SavedOptimizerState(path))


def save_adapter(tensors: Mapping[str, Tensor], config: Mapping[str, Any], directory: Path) -> None:
    """Write A and B as a PEFT adapter in a directory of its own, with a README that says what it is not for."""
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (directory / "README.md").write_text(_ADAPTER_README)


def copy_companions(source: Path, directory: Path) -> None:
    """Put what the dataset has for whoever uses the model beside the weights: a tokenizer, or how pixels are scaled."""
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def write_metrics(records: list[dict[str, Any]], path: Path) -> None:
    """Write one JSON object a line."""
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
    """Return a random name for one attempt at a commit."""
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
