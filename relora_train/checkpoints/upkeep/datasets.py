"""The datasets of a store, what depends on each, and the removal of one that nothing depends on.

The order of a removal is mark (`deleting.json`), manifest, files, mark. If it is killed, the same command ends it. A
reader sees the whole dataset or none. A flow takes its run's lease first, and looks for a mark before it takes a
dataset. A removal writes the mark first, and looks for leases after it, so one of the two sees the other.
Not seen: checkpoints in other stores that name a dataset here.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from relora_train.checkpoints.commit import deletion_order
from relora_train.checkpoints.layout import DELETING_NAME, dataset_prefix, parse_checkpoint_prefix
from relora_train.checkpoints.lease import OBSERVED_TTLS, read_lease
from relora_train.checkpoints.lineage import read_checkpoint
from relora_train.checkpoints.manifest import MANIFEST_NAME, DatasetManifest, read_manifest
from relora_train.checkpoints.series_record import SeriesRecord, is_pointer, protected_by
from relora_train.errors import (
    CheckpointAmbiguousError,
    CheckpointNotFoundError,
    DatasetInUseError,
    StoreUnavailableError,
)
from relora_train.storage.base import ObjectInfo, ObjectStore, put_json


@dataclass(frozen=True)
class StoredDataset:
    """A dataset, or what is left of one."""

    prefix: str
    manifest: DatasetManifest | None
    """None if its upload or its removal never finished."""
    size_bytes: int
    modified_at: datetime
    """The time of its commit, by the store's clock; of the newest object where there is none."""
    used_by: tuple[str, ...]
    """The dependents: 'run R (3 checkpoints)', 'series S', 'mixture N/ID'."""

    @property
    def name(self) -> str:
        """NAME/ID, which names it in this store."""
        return self.prefix.removeprefix("datasets/")


def list_datasets(store: ObjectStore) -> list[StoredDataset]:
    """Return every dataset of a store, by name. Raises CheckpointCorruptError for a record that may depend on one."""
    objects: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in store.list("datasets/"):
        if match := re.match(r"datasets/[^/]+/[^/]+(?=/)", info.key):
            objects[match[0]].append(info)
    manifests = {
        prefix: read_manifest(store, prefix, DatasetManifest)
        for prefix, infos in objects.items()
        if any(info.key == f"{prefix}/{MANIFEST_NAME}" for info in infos)
    }
    users = _users(store, {prefix: manifest for prefix, manifest in manifests.items() if manifest})
    found = []
    for prefix, infos in sorted(objects.items()):
        dates = [info.modified_at for info in infos if info.key == f"{prefix}/{MANIFEST_NAME}"]
        newest = max(dates or [info.modified_at for info in infos])
        size_bytes, manifest = sum(info.size_bytes for info in infos), manifests.get(prefix)
        found.append(StoredDataset(prefix, manifest, size_bytes, newest, tuple(users.get(prefix, ()))))
    return found


def delete_dataset(store: ObjectStore, name: str) -> StoredDataset:
    """Remove the dataset that NAME/ID or its ID names, and return it. Safe to kill and to repeat.

    Raises DatasetInUseError while something depends on it, or a flow that may is under way.
    """
    chosen = _find(store, list_datasets(store), name)
    mark = f"{chosen.prefix}/{DELETING_NAME}"
    put_json(store, mark, {"since": datetime.now(UTC).isoformat(timespec="seconds")})
    info = store.head(mark)
    now = info.modified_at if info else datetime.now(UTC)
    # Read again after the mark: who begins to depend on it from here on sees the mark.
    again = next((each for each in list_datasets(store) if each.prefix == chosen.prefix), chosen)
    if in_use := [*again.used_by, *_flows_under_way(store, now)]:
        store.delete(mark)
        raise DatasetInUseError(
            f"Dataset {chosen.name} in {store.uri} is not deleted: it is needed by {'; '.join(in_use)}. "
            "Delete or prune those first, or wait for a flow to end."
        )
    keys = [info.key for info in store.list(f"{chosen.prefix}/")]
    for key in deletion_order(key for key in keys if key != mark):
        store.delete(key)
    store.delete(mark)
    return chosen


def check_not_deleting(store: ObjectStore, prefix: str) -> None:
    """Return only if no removal of the dataset at a prefix has begun. Ask after the lease is taken."""
    if store.head(f"{prefix}/{DELETING_NAME}") is not None:
        name = prefix.removeprefix("datasets/")
        raise StoreUnavailableError(
            f"Dataset {name} in {store.uri} is being deleted. Wait for it, or end a removal that was interrupted by "
            f"`relora datasets --delete {name}`; then run again, and it is made anew."
        )


def _find(store: ObjectStore, datasets: Sequence[StoredDataset], name: str) -> StoredDataset:
    """Return the one dataset that a person named: NAME/ID, its URI, or at least six digits of its ID."""
    wanted = name.removeprefix(f"{store.uri}/").removeprefix("datasets/").strip("/")
    by_id = re.fullmatch(r"[0-9a-f]{6,64}", wanted)
    found = [
        each
        for each in datasets
        if each.name == wanted
        or (by_id and (each.manifest.dataset_id if each.manifest else each.name.split("/")[1]).startswith(wanted))
    ]
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise CheckpointAmbiguousError(f"{name!r} names {len(found)} datasets of {store.uri}: {names}. Write NAME/ID.")
    if not found:
        there = ", ".join(each.name for each in datasets) or "none"
        raise CheckpointNotFoundError(f"{store.uri} has no dataset {name!r}. Datasets there: {there}.")
    return found[0]


def _users(store: ObjectStore, manifests: Mapping[str, DatasetManifest]) -> dict[str, list[str]]:
    """Return what depends on each dataset, by its prefix, whatever the store is called by now."""
    used: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for info in store.list("runs/"):
        prefix, _, name = info.key.rpartition("/")
        place = parse_checkpoint_prefix(prefix) if name == MANIFEST_NAME else None
        if place and (ref := read_checkpoint(store, prefix)):
            used[_prefix_in(ref.manifest.dataset_uri)][f"run {place.run_id}"] += 1
    found: dict[str, list[str]] = defaultdict(list)
    for prefix, runs in used.items():
        found[prefix] = [f"{run} ({count} checkpoint{'s' if count > 1 else ''})" for run, count in runs.items()]
    for info in store.list("series/"):
        advice = "It may need a dataset, so none is removed. Repair or delete it."
        series = SeriesRecord.find(store, info.key, advice=advice) if is_pointer(info.key) else None
        if series:
            kept = protected_by(series[0])
            scores = [change.scores for change in series[0].changes if change.scores and change.checkpoint in kept]
            for prefix in {_prefix_in(score.dataset_uri) for score in scores}:
                found[prefix].append(f"series {series[0].series}")
    for prefix, manifest in manifests.items():
        for part in manifest.mixture:
            found[dataset_prefix(part.name, part.dataset_id)].append(f"mixture {prefix.removeprefix('datasets/')}")
    return found


def _prefix_in(uri: str) -> str:
    return f"datasets/{uri.rpartition('/datasets/')[2]}"


def _flows_under_way(store: ObjectStore, now: datetime) -> Iterator[str]:
    """Yield the flows that may be about to use any dataset: no lease names the one that its flow will take."""
    for info in [*store.list("runs/"), *store.list("series/")]:
        match = re.fullmatch(r"(run|serie)s/([^/]+)/lease\.json", info.key)
        found = read_lease(store, info.key) if match else None
        if match and found and found[0].purpose == "train" and not found[0].released:
            alive = found[0].holder.is_alive()
            silent = now - info.modified_at > timedelta(seconds=OBSERVED_TTLS * found[0].ttl_seconds)
            if alive or (alive is None and not silent):
                kind = "series" if match[1] == "serie" else "run"
                yield f"the flow of {kind} {match[2]}, which is under way and may take it"
