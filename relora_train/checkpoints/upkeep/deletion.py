"""Remove a whole run from a store, unless something outside it depends on one of its checkpoints.

The order: the run's lease, a status that says 'deleting', a tombstone at every checkpoint, refs, manifests from the
newest, all other objects, the tombstones, the lease. A reader sees a checkpoint whole or not at all. If a delete is
killed, the next one ends it; until then what is left of the run is a shorter line of whole checkpoints.
Who begins to depend on a checkpoint writes that down and then looks for its tombstone: one of the two sees the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from relora_train.checkpoints.commit import deletion_order
from relora_train.checkpoints.layout import check_run_id, parse_checkpoint_prefix
from relora_train.checkpoints.lease import hold_run, lease_key, read_lease, take_lease
from relora_train.checkpoints.lineage import TOMBSTONE_NAME, CheckpointRef, Tombstone
from relora_train.checkpoints.manifest import MANIFEST_NAME
from relora_train.checkpoints.names import unknown_run
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.status import RunStatus, status_key
from relora_train.checkpoints.upkeep.pruning import require_run
from relora_train.checkpoints.upkeep.retention import Protections
from relora_train.errors import ConfigError
from relora_train.storage.base import ObjectStore


@dataclass(frozen=True)
class RunContent:
    """All that a store holds of a run, and what depends on it from outside: checkpoint prefix -> reasons."""

    checkpoints: tuple[CheckpointRef, ...]
    object_count: int
    size_bytes: int
    dependents: Mapping[str, Sequence[str]]


def survey_run(store: ObjectStore, run_id: str) -> RunContent:
    """Return what a delete of the run would remove, and what stands against it.

    Raises CheckpointNotFoundError for a run of which the store holds nothing.
    """
    require_run(store, run_id)
    objects = [info for info in store.list(f"runs/{check_run_id(run_id)}/") if info.key != lease_key(run_id)]
    if not objects:
        raise unknown_run(store, run_id)
    readable, _ = CheckpointStore(store, run_id).survey()
    size_bytes = sum(info.size_bytes for info in objects)
    return RunContent(tuple(readable), len(objects), size_bytes, _dependents(store, run_id))


def delete_run(store: ObjectStore, run_id: str) -> RunContent:
    """Remove a run and return what it was. Safe to kill and to repeat.

    Raises ConfigError, with all that depends on the run, if anything does; RunInUseError while a flow of it lives.
    """
    found = survey_run(store, run_id)
    _refuse(store, run_id, found.dependents)
    prune_key = f"runs/{run_id}/prune.json"
    with hold_run(store, run_id) as lease, take_lease(store, prune_key, f"Run {run_id!r}", purpose="prune") as pruning:

        def check() -> None:
            lease.check()
            pruning.check()

        def delete(keys: Sequence[str]) -> None:
            for key in keys:
                check()
                store.delete(key)

        _delete(store, run_id, found, check, delete)
    for key in (prune_key, lease_key(run_id)):
        held = read_lease(store, key)
        if held is None or held[0].released:  # not that of a flow which began meanwhile
            store.delete(key)
    return found


def _delete(
    store: ObjectStore,
    run_id: str,
    found: RunContent,
    check: Callable[[], None],
    delete: Callable[[Sequence[str]], None],
) -> None:
    check()
    store.put_bytes(status_key(run_id), RunStatus(state="deleting").to_bytes())
    marked = []
    for ref in found.checkpoints:
        check()
        marked.append(f"{ref.prefix}/{TOMBSTONE_NAME}")
        store.put_bytes(marked[-1], Tombstone(reason="`relora delete`", manifest=ref.manifest).to_bytes())
    if late := _dependents(store, run_id):
        delete([*marked, status_key(run_id)])
        _refuse(store, run_id, late)
    kept = (lease_key(run_id), f"runs/{run_id}/prune.json")
    keys = [info.key for info in store.list(f"runs/{run_id}/") if info.key not in kept]
    last = [key for key in keys if key.endswith(f"/{TOMBSTONE_NAME}")] + [status_key(run_id)]
    refs = [key for key in keys if key.startswith(f"runs/{run_id}/refs/")]
    manifests = sorted((key for key in keys if key.endswith(f"/{MANIFEST_NAME}")), reverse=True)  # the newest first
    done = {*last, *refs, *manifests}
    delete([*refs, *manifests, *deletion_order(key for key in keys if key not in done), *last])
    store.abort_stale_uploads(datetime.now(UTC) + timedelta(days=1), prefix=f"runs/{run_id}/")


def _dependents(store: ObjectStore, run_id: str) -> Mapping[str, Sequence[str]]:
    """Return what keeps checkpoints of a run, without the run's own head, lease and snapshots."""
    own = {
        f"the head of run {run_id}", f"run {run_id} started from it", f"a snapshot of run {run_id} started from it",
        f"the flow of run {run_id} is under way and scores it at its end",
    }  # fmt: skip
    found = {}
    for prefix, reasons in Protections(store).find().items():
        place = parse_checkpoint_prefix(prefix)
        if place and place.run_id == run_id and (others := [reason for reason in reasons if reason not in own]):
            found[prefix] = others
    return found


def _refuse(store: ObjectStore, run_id: str, dependents: Mapping[str, Sequence[str]]) -> None:
    if not dependents:
        return
    named = "".join(f"\n  {prefix.rpartition('/')[2]}: {', '.join(why)}" for prefix, why in sorted(dependents.items()))
    raise ConfigError(
        f"Run {run_id!r} in {store.uri} is not deleted, because something depends on it:{named}\nDelete the runs that "
        "branch from it first, take a pin or export mark away with `relora pin CHECKPOINT --remove`, and promote "
        f"another checkpoint in a series. `relora prune {run_id}` removes what nothing needs."
    )
