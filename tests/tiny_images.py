"""scikit-learn's digits as a dataset, a small ViT's profile for it, and images of our own in MNIST's format."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relora_train.data.prepare import prepare_dataset
from relora_train.settings.profile import Profile
from relora_train.training.files import write_manifest

TINY = {
    "name": "tiny-digits",
    "objective": "image_classification",
    "model": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "data": {"name": "digits", "source": "digits", "validation_fraction": 0.25},
    "batch": {"sequences": 32, "sequence_length": 16},
    "schedule": {"warm_start_steps": 80, "cycles": 2, "cycle_length": 80, "warmup_steps": 5, "restart_warmup_steps": 4},
    "relora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    "optimizer": {"learning_rate": 6e-3, "warm_start_learning_rate": 4e-3},
    "evaluation": {"sequences": 1000, "batch_sequences": 256},
    "logging": {"every_steps": 5},
}


def tiny_digits(**sections: Any) -> Profile:
    """The tiny profile; a dict replaces single keys of a section, anything else the whole value."""
    settings: dict[str, Any] = dict(TINY)
    for key, value in sections.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return Profile.model_validate(settings)


def write_digits(directory: Path) -> Path:
    """A committed dataset of all digits."""
    profile = tiny_digits()
    prepared = prepare_dataset(profile.data, profile.tokenizer, directory)
    write_manifest(prepared.manifest, prepared.directory)
    return prepared.directory


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    content = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
