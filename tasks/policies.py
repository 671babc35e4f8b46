"""Named retry policies. A fault that waiting cannot mend is not retried; errors.may_pass is the rule.

No task keeps results or caches: what has been done is what the store's manifests say.
"""

from __future__ import annotations

from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from relora_train import events
from relora_train.errors import may_pass


async def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Return True if the same call may succeed later, and was not yet tried as often as its error allows."""
    error, retry = await state.aresult(raise_on_failure=False), task_run.run_count
    limit, pauses = getattr(error, "max_retries", None), task.retry_delay_seconds
    if not may_pass(error) or (limit is not None and retry > limit):
        return False
    seconds = pauses[min(retry, len(pauses)) - 1] if isinstance(pauses, list) else pauses
    about = {"retry": retry, "retries": task.retries, "seconds": seconds or 0}
    events.emit("retrying", task=task_run.name, message=str(error), **about)
    return True


_COMMON: dict[str, Any] = {
    "retry_jitter_factor": 0.2,
    "retry_condition_fn": worth_retrying,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}

STORE_IO: dict[str, Any] = {"retries": 3, "retry_delay_seconds": [2, 15, 60], **_COMMON}
"""Reading and writing a store, and work that is cheap to repeat."""

TRAINING: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [2, 60], **_COMMON}
"""One stage on a device that may vanish. No timeout: the trainer bounds itself."""
