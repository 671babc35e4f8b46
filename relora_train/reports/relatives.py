"""The runs of a store that are tied to a run: the one it began from, its siblings there, and its branches."""

import itertools
import logging
from collections.abc import Sequence

from relora_train.checkpoints.layout import CheckpointPlace, parse_checkpoint_prefix
from relora_train.checkpoints.lineage import CheckpointRef, read_checkpoint
from relora_train.checkpoints.manifest import MANIFEST_NAME
from relora_train.errors import ReLoRAError
from relora_train.reports.run_data import RelativeRow
from relora_train.storage.base import ObjectStore

RUNS_ASKED = 100
"""Runs whose first checkpoint is read, the newest of a store that has more."""

OBJECTS_LISTED = 20_000
"""A store of more objects is not listed to its end: a report is no reason to wait."""

_log = logging.getLogger(__name__)


def relatives_of(store: ObjectStore, line: Sequence[CheckpointRef], run_id: str) -> tuple[RelativeRow, ...]:
    """Return the parent of a run, if it began from another, then its siblings and branches among the newest runs."""
    own = [ref for ref in line if ref.manifest.run_id == run_id]
    parent = own[0].manifest.parent if own else None
    known = {ref.fingerprint: ref.manifest for ref in line}
    rows = []
    if parent is not None:
        manifest = known.get(parent.fingerprint)
        name = f"{manifest.run_id}@{manifest.stage}" if manifest else parent.uri
        rows.append(RelativeRow(manifest.run_id if manifest else "", f"parent: this run began at {name}"))
    for other in _first_checkpoints(store, run_id):
        manifest, origin = other.manifest, other.manifest.parent
        if origin is None or origin.fingerprint not in known:
            continue
        at = known[origin.fingerprint]
        tie = "sibling" if parent is not None and origin.fingerprint == parent.fingerprint else "branch"
        if tie == "sibling" or at.run_id == run_id:
            rows.append(RelativeRow(manifest.run_id, f"{tie}: it began at {at.run_id}@{at.stage}"))
    return tuple(rows)


def _first_checkpoints(store: ObjectStore, run_id: str) -> list[CheckpointRef]:
    """Return the checkpoint of the fewest steps of every other run; one that cannot be read is left out."""
    first: dict[str, CheckpointPlace] = {}
    newest: dict[str, float] = {}
    for info in itertools.islice(store.list("runs/"), OBJECTS_LISTED):
        prefix, _, name = info.key.rpartition("/")
        if name == MANIFEST_NAME and (place := parse_checkpoint_prefix(prefix)) and place.run_id != run_id:
            first[place.run_id] = min(first.get(place.run_id, place), place, key=lambda one: one.step)
            newest[place.run_id] = max(newest.get(place.run_id, 0.0), info.modified_at.timestamp())
    found = []
    for name in sorted(sorted(newest), key=lambda one: -newest[one])[:RUNS_ASKED]:
        try:
            ref = read_checkpoint(store, first[name].prefix)
        except ReLoRAError as error:
            _log.debug("%s", error)
            continue
        found += [ref] if ref else []
    return found
