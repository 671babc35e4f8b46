"""Requests to worker processes, as files: plain data between the tasks and the processes."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from relora_train.checkpoints.manifest import Dtype, ParentRef
from relora_train.method.stages import Stage
from relora_train.settings.base import FrozenConfig
from relora_train.settings.method import DropoutMask
from relora_train.settings.profile import Profile
from relora_train.settings.tasks import TaskSelection


class StageRequest(FrozenConfig):
    """Train one stage: `python -m relora_train.training.trainer --request FILE`."""

    run_id: str
    profile: Profile
    stage: Stage

    fingerprint: str
    fingerprint_settings: dict[str, Any]
    variant_of: str | None = None
    divergence: dict[str, Any] = Field(default_factory=dict)
    """The manifest's."""

    parent: ParentRef | None = None
    parent_directory: Path | None = None
    """The parent checkpoint on this machine's disk, already verified."""

    source_dtype: Dtype | None = None
    """The parent manifest's."""

    dropout_mask: DropoutMask = "stream"
    """The run's kind of mask, which relora.dropout_mask 'auto' was settled to."""

    dataset_uri: str
    dataset_id: str
    dataset_directory: Path
    output_directory: Path
    """The committed checkpoint appears here; leftovers of a failed attempt are removed."""

    snapshots_directory: Path | None = None
    """Snapshots appear here while the stage runs, one directory each; without it none are made."""

    lock_path: Path | None = None
    """Held by the trainer while it works here, so that an orphan's last snapshot is waited for."""

    snapshot_directory: Path | None = None
    """A snapshot of this very stage to continue from, on this machine's disk and already verified."""

    provenance: dict[str, str] = Field(default_factory=dict)


class ModelCheckRequest(FrozenConfig):
    """Find out if a run's model can be trained: `python -m relora_train.training.model_check_worker --request FILE`."""

    profile: Profile
    low_rank: bool
    """Return True if the run wraps layers."""

    config_directory: Path | None = None
    """config.json of the checkpoint that the run starts from; the profile's own model when absent."""


class RanksRequest(FrozenConfig):
    """Serve requests together with other ranks: `python -m relora_train.training.kept_ranks --request FILE`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"


class TasksRequest(FrozenConfig):
    """Score one checkpoint by tasks: `python -m relora_train.training.evaluate_tasks --request FILE`."""

    profile: Profile
    checkpoint_directory: Path
    selection: TaskSelection
    result_path: Path
    """JSON: the scores of each task by its name."""


class EvaluationRequest(FrozenConfig):
    """Score one checkpoint and sample from it: `python -m relora_train.training.evaluate --request FILE`."""

    profile: Profile
    checkpoint_directory: Path
    dataset_directory: Path
    result_path: Path
    """JSON: the scores of the profile's objective, and samples."""

    sequences: int = Field(ge=1)
