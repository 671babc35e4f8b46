"""A directory <-> a store, for checkpoints and datasets. Light: imports no torch, boto3 or prefect.

A bundle is the files below `<prefix>/` that `<prefix>/manifest.json` lists. It exists when its manifest does.

Guarantees, with any number of writers, a crash at any point, and only conditional single puts to build on:
1. Who sees a manifest sees exactly the files its writer had. Files of two writers never mix.
2. The first manifest wins and never changes. Every other writer of the same work adopts it.
3. Whatever a dead writer left behind is invisible, and a retry completes, reusing what is already uploaded.

How. An object's name fixes its bytes for ever, so that writing it twice, late or at once changes nothing:
- `<prefix>/claim.json`, put if absent before any file, promises the plain names `<prefix>/<file>` to one content (the
  digest of all names, sizes and SHA-256s). Only attempts with exactly this content ever write plain names.
- An attempt with other bytes writes to `<prefix>/variant-<16 hex of its own content digest>/<file>`.
- The manifest says where its files lie (`files_prefix`: empty or the variant).
So the usual bundle is a plain directory that from_pretrained opens as it is; a variant directory is one too. Claims
are not leases: a dead claimant keeps the plain names, and the retry wins from a variant. Whoever then knows the winner
removes the plain files, so that nobody who ignores manifests loads what was not committed.
Whoever prunes a checkpoint writes its tombstone first (tombstone.py), deletes the manifest next and the claim last.
Where a tombstone lies nothing is committed: who met none at first looks again after its manifest, and takes it back.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from relora_train.checkpoints.file_checks import check_file, is_intact, missing_file
from relora_train.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointManifest,
    DatasetManifest,
    FileEntry,
    M,
    Manifest,
    parse_manifest,
)
from relora_train.checkpoints.tombstone import TOMBSTONE_NAME, read_tombstone, removed_message
from relora_train.errors import (
    BucketNotFoundError,
    CheckpointCorruptError,
    DiskFullError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    StoreUnavailableError,
)
from relora_train.storage.base import ObjectStore, find_bytes
from relora_train.storage.durable import replace_durably, write_durably
from relora_train.storage.os_errors import disk_error

CLAIM_NAME = "claim.json"
_DOWNLOADS = 8
_SMALL_BYTES = 64 << 20  # one part of a transfer
_VARIANT = re.compile(r"^variant-[0-9a-f]{16}/")
_log = logging.getLogger("relora_train.checkpoints.bundle")


def read_manifest(store: ObjectStore, prefix: str, kind: type[M]) -> M | None:
    """The manifest of the bundle at this prefix, or None when no bundle was committed there."""
    key = _join(prefix, MANIFEST_NAME)
    found = find_bytes(store, key)
    if found is None:
        return None
    data, _ = found
    return parse_manifest(kind, data, uri=f"{store.uri}/{key}")


def commit_bundle(
    store: ObjectStore, prefix: str, directory: Path, manifest: M, *, permit: Callable[[], None] | None = None
) -> M:
    """Make the files of `directory` visible all at once, or adopt what another writer committed first.

    permit: called before each file, and at last before the manifest makes all visible; what it raises ends the attempt.

    Returns the manifest that the store holds from now on: use it, not the argument. Safe to repeat after any failure;
    what is already uploaded is not uploaded again. Raises PreconditionFailedError if the prefix holds other work,
    CheckpointCorruptError or CheckpointIncompleteError if `directory` is not what the manifest says.
    """
    if winner := read_manifest(store, prefix, type(manifest)):
        return _adopt(store, prefix, manifest, winner)
    _refuse_removed(store, prefix)
    _check_names(manifest)
    for entry in manifest.files:
        check_file(directory / entry.path, entry, uri=(directory / entry.path).as_uri())
    files_prefix, was_claimed = _claim(store, prefix, manifest)
    placed = manifest.model_copy(update={"files_prefix": files_prefix})
    for entry in placed.files:
        if permit is not None:
            permit()
        key = _key(prefix, placed, entry)
        # Under a claim older than this call the name fixes the bytes; otherwise nothing is known of what lies there.
        if not (was_claimed and _is_uploaded(store, key, entry)):
            store.put_file(key, directory / entry.path)
    try:
        _check_uploads(store, prefix, placed)
        if permit is not None:
            permit()
        store.put_bytes(_join(prefix, MANIFEST_NAME), placed.to_bytes(), if_absent=True)
    except (PreconditionFailedError, StoreUnavailableError):
        winner = read_manifest(store, prefix, type(manifest))
        if winner is None:
            raise
        return _adopt(store, prefix, manifest, winner)
    try:
        _refuse_removed(store, prefix)  # a prune that began meanwhile may have deleted files of ours
    except PreconditionFailedError:
        store.delete(_join(prefix, MANIFEST_NAME))
        raise
    if was_claimed:
        remove_leftovers(store, prefix, placed)
    return placed


def fetch_bundle(store: ObjectStore, prefix: str, manifest: Manifest, directory: Path) -> Path:
    """A local directory that holds exactly the bundle's bytes, every file checked by size and SHA-256.

    A file that this process checked before is not read again while its size, times and inode are what they were.

    For a store that is a local directory it is the bundle's own, without a copy: treat it as read-only. Otherwise
    files go to `directory`, intact ones found there are reused, and several processes may ask for the same at once.
    Never falls back to anything else: CheckpointCorruptError or CheckpointIncompleteError says which file and why.
    """
    in_place = _local_directory(store, prefix, manifest)
    if in_place is not None:
        _check_in_place(store, prefix, manifest, in_place, unless_checked_before=True)
        return in_place
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(directory):
            missing = [
                entry
                for entry in manifest.files
                if not is_intact(directory / entry.path, entry, unless_checked_before=True)
            ]
            _check_free_space(directory, missing)
            _download_all(store, prefix, manifest, missing, directory)
            # Here the files lie beside the manifest, also those of a variant: the directory is a bundle of its own.
            placed = manifest.model_copy(update={"files_prefix": ""})
            write_durably(directory / MANIFEST_NAME, placed.to_bytes())
    except OSError as error:
        raise disk_error(error, f"write {error.filename or directory} from {_uri(store, prefix)}") from error
    return directory


def check_local(directory: Path, manifest: Manifest) -> Path:
    """Return a bundle's own directory on this machine if every file in it is as the manifest says.

    A file that this process checked before is not read again, as for fetch_bundle. Raises CheckpointCorruptError or
    CheckpointIncompleteError.
    """
    for entry in manifest.files:
        path = directory / entry.path
        check_file(path, entry, uri=path.as_uri(), unless_checked_before=True)
    return directory


def keep_fetched(store: ObjectStore, made: M, committed: M, source: Path, directory: Path) -> None:
    """Spare fetch_bundle the download of what was committed from `source` just now, by moving it to `directory`.

    made, committed: what commit_bundle was given and gave back; where another attempt won with other bytes nothing is
    moved. Best effort: fetch_bundle checks every byte of what it finds, and downloads the rest.
    """
    if store.local_path(MANIFEST_NAME) is not None or content_digest(made) != content_digest(committed):
        return
    with suppress(OSError):  # such as a directory that somebody is already downloading to
        directory.parent.mkdir(parents=True, exist_ok=True)
        source.rename(directory)


def verify_bundle(store: ObjectStore, prefix: str, manifest: Manifest) -> None:
    """Read every byte of a bundle and return only if all are as committed. Needs disk space for one file."""
    in_place = _local_directory(store, prefix, manifest)
    if in_place is not None:
        _check_in_place(store, prefix, manifest, in_place)
        return
    with tempfile.TemporaryDirectory(prefix="relora-verify-") as scratch:
        for entry in manifest.files:
            _check_free_space(Path(scratch), [entry])
            _download(store, _key(prefix, manifest, entry), entry, Path(scratch)).unlink()


def _check_in_place(
    store: ObjectStore, prefix: str, manifest: Manifest, directory: Path, *, unless_checked_before: bool = False
) -> None:
    for entry in manifest.files:
        uri = f"{store.uri}/{_key(prefix, manifest, entry)}"
        check_file(directory / entry.path, entry, uri=uri, unless_checked_before=unless_checked_before)


def _refuse_removed(store: ObjectStore, prefix: str) -> None:
    tombstone = read_tombstone(store, prefix)
    if tombstone is not None:
        raise PreconditionFailedError(removed_message(_uri(store, prefix), tombstone))


def content_digest(manifest: Manifest) -> str:
    """SHA-256 over names, sizes and digests of a bundle's files: equal exactly when all bytes are equal."""
    listing = sorted((entry.path, entry.size_bytes, entry.sha256) for entry in manifest.files)
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _claim(store: ObjectStore, prefix: str, manifest: Manifest) -> tuple[str, bool]:
    """Where this content may be written, and whether that was settled before this call."""
    key, content = _join(prefix, CLAIM_NAME), content_digest(manifest)
    claim = json.dumps({"content": content, "attempt": manifest.attempt}) + "\n"
    try:
        store.put_bytes(key, claim.encode(), if_absent=True)
        return "", False
    except PreconditionFailedError:
        data, _ = store.get_bytes(key)
    # A claim that cannot be read promises nothing to us: the variant is safe whatever it says.
    if f'"content": "{content}"'.encode() in data:
        return "", True
    _log.info("%s: plain names are promised to another attempt; writing beside them.", _uri(store, prefix))
    return _variant_of(manifest), True


def _variant_of(manifest: Manifest) -> str:
    return f"variant-{content_digest(manifest)[:16]}"


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
    """What two attempts must share to stand for one another."""
    match manifest:
        case CheckpointManifest():
            return f"run {manifest.run_id!r}, fingerprint {manifest.fingerprint}"
        case DatasetManifest():
            return f"dataset {manifest.dataset_id}"
        case _:
            return f"content {content_digest(manifest)}"


def remove_leftovers(store: ObjectStore, prefix: str, winner: Manifest) -> None:
    """Remove what other attempts than the committed one wrote at its prefix, under the names of its files.

    No manifest can ever list these objects: the only one that counts is there and lists others. Best effort.
    """
    listed = {_key(prefix, winner, entry) for entry in winner.files}
    names = {entry.path for entry in winner.files}
    try:
        for info in store.list(f"{prefix}/" if prefix else ""):
            name = _VARIANT.sub("", info.key.removeprefix(f"{prefix}/"))
            if name in names and info.key not in listed:
                store.delete(info.key)
    except StorageError as error:
        _log.warning("%s: leftovers of a dropped attempt stay there: %s", _uri(store, prefix), error)


def _is_uploaded(store: ObjectStore, key: str, entry: FileEntry) -> bool:
    found = store.head(key)
    if found is None or found.size_bytes != entry.size_bytes:
        return False
    path = store.local_path(key)
    return path is None or is_intact(path, entry)


def _check_uploads(store: ObjectStore, prefix: str, manifest: Manifest) -> None:
    for entry in manifest.files:
        key = _key(prefix, manifest, entry)
        found = store.head(key)
        if found is None or found.size_bytes != entry.size_bytes:
            shown = "no such object" if found is None else f"{found.size_bytes} bytes"
            raise StoreUnavailableError(
                f"{store.uri}/{key} was uploaded with {entry.size_bytes} bytes but the store shows {shown}. "
                "Nothing was committed. Run again; if it repeats, something else deletes or writes there."
            )


def _download_all(
    store: ObjectStore, prefix: str, manifest: Manifest, entries: list[FileEntry], directory: Path
) -> None:
    """Small files side by side, so that a dataset of many shards is not bound by one connection.

    Large ones in turn: the store reads their parts side by side, and Ctrl-C waits for what has begun.
    """
    small = [entry for entry in entries if entry.size_bytes <= _SMALL_BYTES]
    with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="download") as pool:
        try:
            begun = [pool.submit(_download, store, _key(prefix, manifest, entry), entry, directory) for entry in small]
            for download in begun:
                download.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for entry in entries:
        if entry.size_bytes > _SMALL_BYTES:
            _download(store, _key(prefix, manifest, entry), entry, directory)


def _download(store: ObjectStore, key: str, entry: FileEntry, directory: Path) -> Path:
    """Put one verified file in its place. Repeats once: a bit may flip on the way, which no one else would notice."""
    uri, target = f"{store.uri}/{key}", directory / entry.path
    if not target.resolve().is_relative_to(directory.resolve()):
        raise CheckpointCorruptError(f"{uri} would be written outside {directory}: a symbolic link leads there.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        for is_last_attempt in (False, True):
            store.get_file(key, part)
            try:
                check_file(part, entry, uri=uri)
                break
            except CheckpointCorruptError as error:
                if is_last_attempt:
                    raise
                _log.warning("%s Downloading it once more, in case it was damaged on the way.", error)
        replace_durably(part, target)
    except BucketNotFoundError:
        raise
    except ObjectNotFoundError as error:
        raise missing_file(uri) from error
    finally:
        part.unlink(missing_ok=True)  # a full disk must not stay full of it
    return target


def _check_free_space(directory: Path, entries: list[FileEntry]) -> None:
    needed, free = sum(entry.size_bytes for entry in entries), shutil.disk_usage(directory).free
    if needed > free:
        raise DiskFullError(
            f"{directory} has {free} bytes free and {needed} are needed. "
            "Free some space or use another cache directory, then run again."
        )


@contextmanager
def _one_process_at_a_time(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, so that a second process waits and finds the files instead of downloading them."""
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _local_directory(store: ObjectStore, prefix: str, manifest: Manifest) -> Path | None:
    inside = store.local_path(_join(prefix, manifest.files_prefix, MANIFEST_NAME))
    return None if inside is None else inside.parent


def _check_names(manifest: Manifest) -> None:
    for entry in manifest.files:
        first = entry.path.partition("/")[0]
        if first in (MANIFEST_NAME, CLAIM_NAME, TOMBSTONE_NAME) or first.startswith("variant-"):
            raise StorageError(f"A bundle cannot hold a file named {entry.path!r}: the name is reserved. Rename it.")


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _key(prefix: str, manifest: Manifest, entry: FileEntry) -> str:
    return _join(prefix, manifest.files_prefix, entry.path)


def _uri(store: ObjectStore, prefix: str) -> str:
    return _join(store.uri, prefix)
