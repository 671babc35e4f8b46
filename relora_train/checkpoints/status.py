"""The status of a run, as its flow writes it while it works: `runs/<run_id>/status.json`.

For people only: nothing is decided by it, and what it says is at most some seconds old. The lease tells whether the
flow that wrote it still lives (runs/survey.py).
"""

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from relora_train.checkpoints.layout import check_run_id
from relora_train.checkpoints.manifest import StoredRecord
from relora_train.errors import CheckpointCorruptError
from relora_train.storage.base import ObjectStore

STATUS_NAME = "status.json"


class RunStatus(StoredRecord):
    """The content of status.json."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="constants")  # a loss may be infinite

    state: Literal["running", "waiting", "done", "failed", "diverged", "interrupted", "deleting"]
    """'waiting': a task failed and is tried again soon; 'deleting': a `relora delete` was begun."""
    written_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    """By the writer's clock."""
    profile: str = ""
    stages: dict[str, int] = Field(default_factory=dict)
    """The planned stages, in order, each with its last step."""
    stage: str = ""
    progress: dict[str, Any] = Field(default_factory=dict)
    """The latest event 'progress' of that stage."""
    message: str = ""
    """The error that ended the run, or for which it waits."""
    records: tuple[dict[str, Any], ...] = ()
    """Metrics of stages that are not stored yet, as events have told them."""

    @field_validator("progress")
    @classmethod
    def progress_is_an_event(cls, value: dict[str, Any]) -> dict[str, Any]:
        numbers = ("step", "start_step", "end_step", "loss", "learning_rate", "tokens_per_second", "eta_seconds")
        if value and not (
            value.get("event") == "progress" and all(isinstance(value.get(n), int | float) for n in numbers)
        ):
            raise ValueError("it is no event 'progress'")
        return value

    @field_validator("records")
    @classmethod
    def records_name_kind_stage_and_step(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for one in value:
            if [type(one.get(key)) for key in ("kind", "stage", "step")] != [str, str, int]:
                raise ValueError(f"a record lacks kind, stage or step: {one}")
        return value


def status_key(run_id: str) -> str:
    return f"runs/{check_run_id(run_id)}/{STATUS_NAME}"


def read_status(store: ObjectStore, run_id: str) -> RunStatus | None:
    """Return the status of a run; None if there is none, or if it cannot be read."""
    try:
        found = RunStatus.find(store, status_key(run_id), advice="Delete it; the run's next flow writes it anew.")
    except CheckpointCorruptError:
        return None
    return found and found[0]
