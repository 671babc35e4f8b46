"""Find the store and what is in it before any work starts."""

from __future__ import annotations

import os
from pathlib import Path

from prefect import task
from prefect.runtime import deployment

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.errors import ConfigError
from relora_train.reports.report import link_hours
from relora_train.runs.run import STORE_VARIABLE, default_store_uri
from relora_train.storage.opening import open_store
from tasks.policies import STORE_IO


@task(**STORE_IO, task_run_name="open-store")
def open_run_store(uri: str | None) -> str:
    """Return the store's full URI after a probe that it can be written and honours conditional writes."""
    named = uri or os.environ.get(STORE_VARIABLE)
    if deployment.id and named is None:
        raise ConfigError(
            f"The run of a deployment needs a store by name: set {STORE_VARIABLE} where the worker is started, or give "
            "the parameter `store`: s3://bucket/prefix, or an absolute directory for a worker on one machine."
        )
    if deployment.id and named and "://" not in named and not Path(named).expanduser().is_absolute():
        raise ConfigError(
            f"The store {named!r} is a relative path, and the run of a deployment has a working directory that is "
            "removed after it. Give an absolute directory or s3://bucket/prefix."
        )
    link_hours()  # a report comes last: what is wrong with its setting is known now
    store = open_store(uri or default_store_uri())
    store.preflight()
    return store.uri


@task(**STORE_IO, task_run_name="resolve-{spec}")
def resolve_parent(spec: str, store_uri: str) -> CheckpointRef:
    """Return the one committed checkpoint that the user named."""
    return resolve_checkpoint(spec, open_store(store_uri))
