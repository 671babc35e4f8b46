"""The commit protocol: a directory becomes a bundle that is there completely or not at all.

A bundle is the files below `<prefix>/` that `<prefix>/manifest.json` lists. Guarantees, with any number of writers, a
crash at any point, and only conditional single puts to build on:
1. A reader of a manifest finds exactly the files its writer had. Files of two writers never mix.
2. The first manifest wins and never changes. Every other writer of the same work adopts it.
3. The leftovers of a dead writer are invisible. A retry completes it and reuses what is uploaded.
README.md explains how claims, variants and tombstones keep these promises.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from relora_train.checkpoints.fetch import check_file, is_intact
from relora_train.checkpoints.layout import join_key
from relora_train.checkpoints.lineage import TOMBSTONE_NAME, removal_at
from relora_train.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointManifest,
    DatasetManifest,
    M,
    Manifest,
    content_digest,
    read_manifest,
)
from relora_train.errors import PreconditionFailedError, StorageError, StoreUnavailableError
from relora_train.storage.base import ObjectStore

CLAIM_NAME = "claim.json"
_VARIANT = re.compile(r"^variant-[0-9a-f]{16}/")
_log = logging.getLogger("relora_train.checkpoints.commit")


def commit_bundle(
    store: ObjectStore,
    prefix: str,
    directory: Path,
    manifest: M,
    *,
    check_lease: Callable[[], None] = lambda: None,
) -> M:
    """Make the files of a directory visible all at once, or adopt what another writer committed first.

    Safe to repeat after any failure; what is already uploaded is not uploaded again.

    Args:
        check_lease: called before each file and before the manifest; an exception from it ends the attempt

    Returns the manifest that the store holds from now on: use it, not the argument. Raises PreconditionFailedError if
    the prefix holds other work or a tombstone, CheckpointCorruptError or CheckpointIncompleteError if the directory is
    not what the manifest says.
    """
    if winner := read_manifest(store, prefix, type(manifest)):
        return _adopt(store, prefix, manifest, winner)
    if removal := removal_at(store, prefix):
        raise PreconditionFailedError(removal)
    for entry in manifest.files:
        first = entry.path.partition("/")[0]
        if first in (MANIFEST_NAME, CLAIM_NAME, TOMBSTONE_NAME) or first.startswith("variant-"):
            raise StorageError(f"A bundle cannot hold a file named {entry.path!r}: the name is reserved. Rename it.")
        check_file(directory / entry.path, entry, uri=(directory / entry.path).as_uri())

    # The first claim promises the plain names to one content for ever. An attempt with other bytes writes beside them.
    content = content_digest(manifest)
    claim_key, files_prefix, was_claimed = join_key(prefix, CLAIM_NAME), "", False
    claim = json.dumps({"content": content, "attempt": manifest.attempt}) + "\n"
    try:
        store.put_bytes(claim_key, claim.encode(), if_absent=True)
    except PreconditionFailedError:
        was_claimed = True
        # A claim that cannot be read promises nothing to this attempt: a variant is safe whatever it says.
        if f'"content": "{content}"'.encode() not in store.get_bytes(claim_key)[0]:
            files_prefix = f"variant-{content[:16]}"
            _log.info("%s: plain names are promised to another attempt; writing beside them.", _uri(store, prefix))
    placed = manifest.model_copy(update={"files_prefix": files_prefix})

    for entry in placed.files:
        check_lease()
        key = placed.key_of(entry, prefix)
        # Under a claim older than this call the name fixes the bytes. Otherwise nothing is known of an object there.
        found = store.head(key) if was_claimed else None
        path = store.local_path(key)
        is_uploaded = found is not None and found.size_bytes == entry.size_bytes
        if not (is_uploaded and (path is None or is_intact(path, entry))):
            store.put_file(key, directory / entry.path)

    try:
        for entry in placed.files:
            key = placed.key_of(entry, prefix)
            found = store.head(key)
            if found is None or found.size_bytes != entry.size_bytes:
                shown = "no such object" if found is None else f"{found.size_bytes} bytes"
                raise StoreUnavailableError(
                    f"{store.uri}/{key} was uploaded with {entry.size_bytes} bytes but the store shows {shown}. "
                    "Nothing was committed. Run again; if it repeats, something else deletes or writes there."
                )
        check_lease()
        store.put_bytes(join_key(prefix, MANIFEST_NAME), placed.to_bytes(), if_absent=True)
    except (PreconditionFailedError, StoreUnavailableError):
        winner = read_manifest(store, prefix, type(manifest))
        if winner is None:
            raise
        return _adopt(store, prefix, manifest, winner)

    if removal := removal_at(store, prefix):  # a prune that began meanwhile may have deleted files of this attempt
        store.delete(join_key(prefix, MANIFEST_NAME))
        raise PreconditionFailedError(removal)
    if was_claimed:
        remove_leftovers(store, prefix, placed)
    return placed


def _adopt(store: ObjectStore, prefix: str, ours: M, winner: M) -> M:
    if _work(winner) != _work(ours):
        raise PreconditionFailedError(
            f"{_uri(store, prefix)} already holds other work: {_work(winner)}, while this is {_work(ours)}. "
            "Nothing was changed there. Use another run id or name."
        )
    if winner.attempt != ours.attempt:
        _log.warning(
            "%s was committed by another attempt (%s, at %s); this attempt (%s) is dropped and the committed one used.",
            _uri(store, prefix), winner.attempt, winner.created_at.isoformat(timespec="seconds"), ours.attempt,
        )  # fmt: skip
    remove_leftovers(store, prefix, winner)
    return winner


def _work(manifest: Manifest) -> str:
    """Return what two attempts must share to stand for one another."""
    match manifest:
        case CheckpointManifest():
            return f"run {manifest.run_id!r}, fingerprint {manifest.fingerprint}"
        case DatasetManifest():
            return f"dataset {manifest.dataset_id}"
        case _:
            return f"content {content_digest(manifest)}"


def remove_leftovers(store: ObjectStore, prefix: str, winner: Manifest) -> None:
    """Remove what other attempts than the committed one wrote at its prefix, under the names of its files.

    No manifest can ever list these objects: the only one that counts exists and lists others. Best effort.
    """
    listed = {winner.key_of(entry, prefix) for entry in winner.files}
    names = {entry.path for entry in winner.files}
    try:
        for info in store.list(f"{prefix}/" if prefix else ""):
            name = _VARIANT.sub("", info.key.removeprefix(f"{prefix}/"))
            if name in names and info.key not in listed:
                store.delete(info.key)
    except StorageError as error:
        _log.warning("%s: leftovers of a dropped attempt stay there: %s", _uri(store, prefix), error)


def deletion_order(keys: Iterable[str]) -> list[str]:
    """Sort the keys of bundles so that a killed delete leaves no half of one visible: manifests first, claims last."""
    order = {MANIFEST_NAME: 0, CLAIM_NAME: 2}
    return sorted(keys, key=lambda key: (order.get(key.rpartition("/")[2], 1), key))


def _uri(store: ObjectStore, prefix: str) -> str:
    return join_key(store.uri, prefix)
