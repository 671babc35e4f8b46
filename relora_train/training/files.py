"""Training state <-> a checkpoint directory, as design §4 lists its files. The manifest is written last."""

import json
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
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
from relora_train.errors import CheckpointCorruptError, CheckpointIncompleteError
from relora_train.settings.base import FrozenConfig

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"
METRICS_FILE = "metrics.jsonl"
PROFILE_FILE = "profile.json"
ADAPTER_DIRECTORY = "adapter"
MAX_SHARD_BYTES = 5 * 10**9

_DENSE_ABOVE = 0.5  # share of kept entries from which index and value cost more than the dense tensor
_PACKAGES = ("relora-train", "torch", "transformers", "tokenizers", "safetensors", "numpy", "prefect", "bitsandbytes")

V = TypeVar("V")
OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> {'step', 'exp_avg', 'exp_avg_sq'}, or 'step' and what a rule holds (method/rules.py)."""


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

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class MasterWeights(LazyMapping[Tensor], MutableMapping[str, Tensor]):
    """The exact float32 weights behind those that a device holds rounded to bfloat16, by name.

    They are the parent checkpoint's until overwritten, and read from disk one at a time. One that is overwritten goes
    to the disk too: all merged ones together are as large as the model. Its file in `scratch` has no name any more, so
    nothing of it outlives the process. Without `keeps` one that is overwritten is dropped: another rank writes it.
    """

    def __init__(
        self, names: Iterable[str], read: Callable[[str], Tensor], scratch: Path, *, keeps: bool = True
    ) -> None:
        super().__init__(sorted(names), read)
        self._scratch = scratch if scratch.is_dir() else None  # on a machine beside the flow's: the system's own
        self._written: dict[str, Tensor] = {}
        self._keeps = keeps

    def __getitem__(self, name: str) -> Tensor:
        return self._written[name] if name in self._written else super().__getitem__(name)

    def __setitem__(self, name: str, value: Tensor) -> None:
        if not self._keeps:
            return
        value = value.detach().cpu().contiguous()
        if not value.numel():  # a rank without a row of it: an empty file cannot be mapped
            self._written[name] = value
            return
        with tempfile.NamedTemporaryFile(dir=self._scratch) as file:
            file.write(value.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=False, size=value.numel(), dtype=value.dtype)
        self._written[name] = mapped.view(value.shape)

    def __delitem__(self, name: str) -> None:
        raise TypeError("a master weight cannot be removed")


def save_model(model: nn.Module, directory: Path, *, weights: Mapping[str, Tensor]) -> None:
    """Write weights and configuration as `save_pretrained` does, under Hugging Face names, in float32.

    weights: the model's state without lora_A and lora_B, already merged. Tied weights are written once.
    """
    from transformers.utils.logging import disable_progress_bar

    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise CheckpointCorruptError(f"{name} is {tensor.dtype}; checkpoints hold float32 only.")
    disable_progress_bar()
    cast(Any, model).save_pretrained(directory, state_dict=dict(weights), max_shard_size=MAX_SHARD_BYTES)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if config.get("dtype") != "float32":  # the dtype of the model in memory, to which from_pretrained would round
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def read_tensor(directory: Path, name: str, *, rows: slice | None = None) -> Tensor | None:
    """Return one tensor of a checkpoint's model, or these rows of it; None if it holds none of that name."""
    index = directory / f"{MODEL_FILE}.index.json"
    file = json.loads(index.read_text())["weight_map"].get(name, "") if index.is_file() else MODEL_FILE
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


class SavedOptimizerState(LazyMapping[dict[str, Tensor]]):
    """The state that `save_optimizer_state` wrote, read from the disk on demand, one parameter at a time."""

    def __init__(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        self._file = file
        self._sparse: dict[str, list[int]] = json.loads((file.metadata() or {}).get("sparse_shapes", "{}"))
        dense = [key for key in file.keys() if not key.endswith((".idx", ".val"))]  # noqa: SIM118 (not a dict)
        keys: dict[str, list[str]] = {}
        for name in (*dense, *self._sparse):
            parameter, _, key = name.rpartition(".")
            keys.setdefault(parameter, []).append(key)
        self._keys = keys
        super().__init__(keys, lambda name: {key: self._tensor(f"{name}.{key}") for key in keys[name]})

    def shapes_of(self, parameter: str) -> dict[str, torch.Size]:
        """Return the shape of each of its tensors, without reading them."""
        names = {key: f"{parameter}.{key}" for key in self._keys[parameter]}
        return {
            key: torch.Size(self._sparse[name] if name in self._sparse else self._file.get_slice(name).get_shape())
            for key, name in names.items()
        }

    def _tensor(self, name: str) -> Tensor:
        if name not in self._sparse:
            return cast(Tensor, self._file.get_tensor(name))
        values = self._file.get_tensor(f"{name}.val")
        tensor = torch.zeros(self._sparse[name], dtype=values.dtype)
        tensor.view(-1)[self._file.get_tensor(f"{name}.idx").long()] = values
        return tensor


def write_metrics(records: list[dict[str, Any]], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_training_state(directory: Path) -> TrainingState:
    """Return step and data position of a checkpoint."""
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
    """Return the versions of the packages that decide a result."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
