"""Find the store and what is in it before any work starts."""

from __future__ import annotations

from prefect import task

from relora_train.checkpoint_resolve import resolve_checkpoint
from relora_train.checkpoint_store import CheckpointRef
from relora_train.run import default_store_uri
from relora_train.storage.opening import open_store
from tasks.policies import STORE_IO


@task(**STORE_IO, task_run_name="open-store")
def open_run_store(uri: str | None) -> str:
    """Return the store's full URI after a probe that it can be written and honours conditional writes."""
    store = open_store(uri or default_store_uri())
    store.preflight()
    return store.uri


@task(**STORE_IO, task_run_name="resolve-{spec}")
def resolve_parent(spec: str, store_uri: str) -> CheckpointRef:
    """Return the one committed checkpoint that the user named."""
    return resolve_checkpoint(spec, open_store(store_uri))
