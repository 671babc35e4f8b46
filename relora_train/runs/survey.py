"""The state of every run in a store: from listings, leases, status records and the newest manifests alone."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

from relora_train.checkpoints.layout import join_key, parse_checkpoint_prefix
from relora_train.checkpoints.lease import LeaseRecord, lease_key, read_lease
from relora_train.checkpoints.lineage import CheckpointRef, read_checkpoint
from relora_train.checkpoints.manifest import MANIFEST_NAME
from relora_train.checkpoints.status import RunStatus, read_status, status_key
from relora_train.errors import CheckpointError, ReLoRAError
from relora_train.method.stages import stages_after
from relora_train.settings.profile import profile_to_read
from relora_train.storage.base import ObjectInfo, ObjectStore

_READERS = 8
_LIVE_TTLS = 1.25  # as for a lease; here by two clocks, which is good enough for a look
_log = logging.getLogger(__name__)

State = Literal["running", "waiting", "done", "failed", "diverged", "interrupted", "deleting"]
FAILED = ("failed", "diverged", "interrupted")
"""States in which a run stands still before its end."""


@dataclass(frozen=True)
class RunOverview:
    """One run in a store, as it stands."""

    run_id: str
    state: State
    profile: str | None
    """None when the latest checkpoint's manifest is damaged."""
    stage: str
    step: int
    """Updates done, those of a running stage included."""
    planned_steps: int | None
    latest_step: int
    """The step of the latest checkpoint; 0 without one."""
    checkpoint_count: int
    evaluation: Mapping[str, float]
    """The latest checkpoint's."""
    modified_at: datetime
    """The last sign of life, by the store's clock."""
    holder: str | None
    """The process that trains it, if it lives."""
    message: str
    """The error that ended the run, or for which it waits."""
    status: RunStatus | None


def survey_runs(store: ObjectStore, run_id: str | None = None) -> Sequence[RunOverview]:
    """Return every run, or only this one, by run id: also those without a checkpoint yet. A damaged manifest warns."""
    by_run: dict[str, list[ObjectInfo]] = {}
    for info in store.list(f"runs/{run_id}/" if run_id else "runs/"):
        if info.key.count("/") >= 2:
            by_run.setdefault(info.key.split("/")[1], []).append(info)
    there = {
        run: objects
        for run, objects in sorted(by_run.items())
        if any(not info.key.endswith(("/lease.json", "/prune.json")) for info in objects)
    }
    with ThreadPoolExecutor(_READERS) as pool:  # three small objects a run, which a remote store takes its time for
        return list(pool.map(partial(_overview, store), there.keys(), there.values()))


def _overview(store: ObjectStore, run_id: str, objects: Sequence[ObjectInfo]) -> RunOverview:
    by_key = {info.key: info for info in objects}
    prefixes = [info.key.rpartition("/")[0] for info in objects if info.key.endswith(f"/{MANIFEST_NAME}")]
    places = [place for prefix in prefixes if (place := parse_checkpoint_prefix(prefix))]
    newest = max(places, key=lambda place: place.step, default=None)
    latest: CheckpointRef | None = None
    if newest is not None:
        try:
            latest = read_checkpoint(store, newest.prefix)
        except CheckpointError as error:
            _log.warning("%s", error)  # a list is where an operator sees the damage, so it must still come
    status = read_status(store, run_id) if status_key(run_id) in by_key else None
    holder = _holder(store, by_key.get(lease_key(run_id)))
    planned, profile = None, latest.manifest.profile if latest else None
    latest_step = newest.step if newest else 0
    if status is not None and status.stages:
        planned, profile = list(status.stages.values())[-1], profile if newest else status.profile
    elif latest is not None:
        planned = _planned_steps(store, latest)
    diverged = any(info.key.startswith(f"runs/{run_id}/diverged/") for info in objects)
    state = state_of(status, is_held=holder is not None, is_done=latest_step == planned, has_diverged=diverged)
    live = status is not None and state in ("running", "waiting")
    return RunOverview(
        run_id=run_id,
        state=state,
        profile=profile,
        stage=status.stage if status and live and status.stage else latest.manifest.stage if latest else "",
        step=max(latest_step, int(status.progress.get("step", 0)) if status and live else 0),
        planned_steps=planned,
        latest_step=latest_step,
        checkpoint_count=len(places),
        evaluation=latest.manifest.evaluation if latest else {},
        modified_at=max(info.modified_at for info in objects),
        holder=str(holder.holder) if holder else None,
        message=status.message if status and state not in ("running", "done") else "",
        status=status,
    )


def state_of(status: RunStatus | None, *, is_held: bool, is_done: bool, has_diverged: bool) -> State:
    """Return the state of a run. Without a status (of an earlier version) its checkpoints decide. Pure."""
    if status is not None and status.state == "deleting":
        return "deleting"
    if is_held:
        return "waiting" if status is not None and status.state == "waiting" else "running"
    if status is None:
        return "done" if is_done else "diverged" if has_diverged else "interrupted"
    return "interrupted" if status.state in ("running", "waiting") else status.state


def _holder(store: ObjectStore, lease: ObjectInfo | None) -> LeaseRecord | None:
    """Return the lease of the flow that trains the run, if it lives or, where that cannot be seen, was just renewed."""
    with suppress(CheckpointError):
        found = read_lease(store, lease.key) if lease else None
        if lease is None or found is None or found[0].released or found[0].purpose != "train":
            return None
        alive, limit = found[0].holder.is_alive(), timedelta(seconds=found[0].ttl_seconds * _LIVE_TTLS)
        return found[0] if alive or (alive is None and datetime.now(UTC) - lease.modified_at < limit) else None
    return None


def _planned_steps(store: ObjectStore, latest: CheckpointRef) -> int | None:
    """Return the last step of the plan by the settings beside the latest checkpoint; None if they do not tell."""
    with suppress(ReLoRAError, ValueError):
        place = join_key(latest.prefix, latest.manifest.files_prefix, "profile.json")
        remaining = stages_after(profile_to_read(store.get_bytes(place)[0]), latest.manifest)
        return remaining[-1].end_step if remaining else latest.step
    return None


def describe(run: RunOverview) -> dict[str, Any]:
    """Return the overview as plain data."""
    return {key: value for key, value in vars(run).items() if key not in ("status", "modified_at")} | {
        "modified_at": run.modified_at.isoformat()
    }
