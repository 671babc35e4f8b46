"""Small bundles for the tests of what is built on them."""

import hashlib
import uuid
from pathlib import Path

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import CheckpointManifest, DatasetManifest, ParentRef, describe_files

FILES = {"model.safetensors": 5000, "config.json": 40, "adapter/adapter_model.safetensors": 300, "empty.txt": 0}


def write_files(directory: Path, seed: str) -> Path:
    """Files with the usual names and sizes; their bytes follow from the seed alone."""
    for name, size_bytes in FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        block = hashlib.sha256(f"{seed} {name}".encode()).digest()
        path.write_bytes((block * (size_bytes // 32 + 1))[:size_bytes])
    return directory


def fingerprint_of(work: str) -> str:
    return hashlib.sha256(work.encode()).hexdigest()


def checkpoint_manifest(
    directory: Path,
    *,
    run_id: str = "run",
    step: int = 400,
    work: str = "work",
    stage: str = "cycle-2",
    parent: CheckpointRef | None = None,
) -> CheckpointManifest:
    parent_ref = parent and ParentRef(uri=parent.uri, fingerprint=parent.fingerprint, step=parent.step)
    return CheckpointManifest(
        files=describe_files(directory), attempt=uuid.uuid4().hex, run_id=run_id, profile="tiny", stage=stage,
        step=step, cycle=2, tokens_seen=step * 1000, fingerprint=fingerprint_of(work), fingerprint_settings={},
        parent=parent_ref, dataset_id="d" * 64, dataset_uri="memory://x/datasets/d",
    )  # fmt: skip


def dataset_manifest(directory: Path, *, name: str = "corpus", dataset_id: str = "d" * 64) -> DatasetManifest:
    return DatasetManifest(
        files=describe_files(directory), attempt=uuid.uuid4().hex, name=name, dataset_id=dataset_id, inputs={},
        token_dtype="uint16", vocab_size=10, eos_id=0, train_tokens=1, train_documents=1, train_bytes=1, val_tokens=1,
        val_documents=1, val_bytes=1,
    )  # fmt: skip
