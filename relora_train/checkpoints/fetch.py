"""Bundles on the way from a store to this machine's disk. Every byte is checked by size and SHA-256.

Reading gigabytes again at every stage would be waste. On request a file is not read again if this process found it
sound before and its size, times and inode have not changed since. A file written within the last seconds is not
remembered: a second write in the same tick of the file system's clock could not be told from it.
"""

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from relora_train.checkpoints.layout import checkpoint_name, join_key
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import MANIFEST_NAME, FileEntry, M, Manifest, content_digest, hash_file
from relora_train.errors import (
    BucketNotFoundError,
    CheckpointCorruptError,
    CheckpointIncompleteError,
    DiskFullError,
    ObjectNotFoundError,
)
from relora_train.storage.base import ObjectStore
from relora_train.storage.durable import disk_error, locked, replace_durably, write_durably
from relora_train.storage.opening import open_store

_DOWNLOADS = 8
_SMALL_BYTES = 64 << 20  # one part of a transfer
_SETTLED_SECONDS = 2.0
_Seen = tuple[int, int, int, int, int]
_sound: dict[tuple[Path, str], _Seen] = {}
_log = logging.getLogger("relora_train.checkpoints.fetch")

FetchFiles = Callable[[CheckpointRef, Sequence[str]], Path]
"""Returns a local directory that holds the named files of a checkpoint, and maybe others."""


def fetch_bundle(store: ObjectStore, prefix: str, manifest: Manifest, directory: Path) -> Path:
    """Return a local directory that holds exactly the bundle's bytes.

    For a store that is a local directory this is the bundle's own, without a copy: treat it as read-only. Otherwise
    files go to `directory`, intact ones found there are reused, and several processes may ask for the same at once. A
    file that this process checked before is not read again while its size, times and inode are what they were.

    Raises CheckpointCorruptError or CheckpointIncompleteError, which name the file and the reason.
    """
    if in_place := _local_directory(store, prefix, manifest):
        return check_local(in_place, manifest, uri=join_key(store.uri, prefix, manifest.files_prefix))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / ".lock"):  # a second process waits and finds the files instead of downloading them
            missing = [e for e in manifest.files if not is_intact(directory / e.path, e, unless_checked_before=True)]
            _check_free_space(directory, missing)
            # Small files side by side, so that a dataset of many shards is not bound by one connection. Large ones in
            # turn: the store reads their parts side by side, and Ctrl-C waits for what has begun.
            small = [entry for entry in missing if entry.size_bytes <= _SMALL_BYTES]
            with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="download") as pool:
                begun = [pool.submit(_download, store, prefix, manifest, entry, directory) for entry in small]
                try:
                    for download in begun:
                        download.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            for entry in missing:
                if entry.size_bytes > _SMALL_BYTES:
                    _download(store, prefix, manifest, entry, directory)
            # Here the files lie beside the manifest, also those of a variant: the directory is a bundle of its own.
            placed = manifest.model_copy(update={"files_prefix": ""})
            write_durably(directory / MANIFEST_NAME, placed.to_bytes())
    except OSError as error:
        source = join_key(store.uri, prefix)
        raise disk_error(error, f"write {error.filename or directory} from {source}") from error
    return directory


def check_local(
    directory: Path, manifest: Manifest, *, uri: str | None = None, unless_checked_before: bool = True
) -> Path:
    """Return a bundle's own directory on this machine if every file in it is as the manifest says.

    A file that this process checked before is not read again, as for fetch_bundle. Raises CheckpointCorruptError or
    CheckpointIncompleteError.
    """
    for entry in manifest.files:
        named = f"{uri or directory.as_uri()}/{entry.path}"
        check_file(directory / entry.path, entry, uri=named, unless_checked_before=unless_checked_before)
    return directory


def verify_bundle(store: ObjectStore, prefix: str, manifest: Manifest) -> None:
    """Read every byte of a bundle and return only if all are as committed. Needs disk space for one file."""
    if in_place := _local_directory(store, prefix, manifest):
        uri = join_key(store.uri, prefix, manifest.files_prefix)
        check_local(in_place, manifest, uri=uri, unless_checked_before=False)
        return
    with tempfile.TemporaryDirectory(prefix="relora-verify-") as scratch:
        for entry in manifest.files:
            _check_free_space(Path(scratch), [entry])
            _download(store, prefix, manifest, entry, Path(scratch)).unlink()


def keep_fetched(store: ObjectStore, made: M, committed: M, source: Path, directory: Path) -> None:
    """Move what was just committed from `source` to `directory`, which spares fetch_bundle the download.

    made, committed: the manifests that commit_bundle was given and returned. If another attempt won with other bytes,
    nothing is moved. Best effort: fetch_bundle checks every byte of what it finds, and downloads the rest.
    """
    if store.local_path(MANIFEST_NAME) is not None or content_digest(made) != content_digest(committed):
        return
    with suppress(OSError):  # such as a directory that another process is already downloading to
        directory.parent.mkdir(parents=True, exist_ok=True)
        source.rename(directory)


def fetch_checkpoint(ref: CheckpointRef, cache_dir: Path, *, store: ObjectStore | None = None) -> Path:
    """Return a local directory with a checkpoint's verified files: the store's own, or one below `cache_dir`."""
    store = store or open_store(ref.store_uri)
    return fetch_bundle(store, ref.prefix, ref.manifest, fetched_directory(ref, cache_dir))


def fetched_directory(ref: CheckpointRef, cache_dir: Path) -> Path:
    """Return the directory that fetch_checkpoint downloads to. Two checkpoints never share one."""
    digest = hashlib.sha256(ref.manifest.to_bytes()).hexdigest()[:12]
    return cache_dir / f"{checkpoint_name(ref.step, ref.fingerprint)}-{digest}"


def files_in_stores(cache_dir: Path) -> FetchFiles:
    """Return a function that fetches single files of checkpoints from the stores in which they were found.

    If the store is on this machine's disk, they are used in place; else they are downloaded once, below `cache_dir`.
    """

    def fetch(ref: CheckpointRef, names: Sequence[str]) -> Path:
        entries = tuple(entry for entry in ref.manifest.files if entry.path in names)
        if missing := sorted(set(names) - {entry.path for entry in entries}):
            raise CheckpointIncompleteError(
                f"{ref.uri} holds no {' and no '.join(missing)}: its manifest names none. Use another checkpoint."
            )
        part = ref.manifest.model_copy(update={"files": entries})
        directory = cache_dir / f"report-{ref.fingerprint[:12]}-{ref.manifest.attempt}"
        return fetch_bundle(open_store(ref.store_uri), ref.prefix, part, directory)

    return fetch


def _download(store: ObjectStore, prefix: str, manifest: Manifest, entry: FileEntry, directory: Path) -> Path:
    """Put one verified file in its place. If it arrives damaged, download it once more."""
    key, target = manifest.key_of(entry, prefix), directory / entry.path
    uri = f"{store.uri}/{key}"
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


def _local_directory(store: ObjectStore, prefix: str, manifest: Manifest) -> Path | None:
    inside = store.local_path(join_key(prefix, manifest.files_prefix, MANIFEST_NAME))
    return inside and inside.parent


def check_file(path: Path, entry: FileEntry, *, uri: str, unless_checked_before: bool = False) -> None:
    """Return only if the file is as the manifest says; else CheckpointIncompleteError or CheckpointCorruptError."""
    if not path.is_file():
        raise missing_file(uri)
    expected, found = f"{entry.size_bytes} bytes", f"{path.stat().st_size} bytes"
    if expected == found:
        expected, found = f"SHA-256 {entry.sha256}", f"SHA-256 {_digest(path, entry, unless_checked_before)}"
    if expected != found:
        raise CheckpointCorruptError(
            f"{uri} is damaged: its manifest says {expected}, found {found}. It is not used. "
            "Use another checkpoint, or delete the whole prefix and make it again."
        )


def is_intact(path: Path, entry: FileEntry, *, unless_checked_before: bool = False) -> bool:
    """Return True if the file is there and as the manifest says."""
    if not path.is_file() or path.stat().st_size != entry.size_bytes:
        return False
    return _digest(path, entry, unless_checked_before) == entry.sha256


def missing_file(uri: str) -> CheckpointIncompleteError:
    """Return the error for a file that a manifest lists and that is not there."""
    return CheckpointIncompleteError(
        f"{uri} is listed in its manifest but is not there. "
        "Use another checkpoint, or delete the whole prefix and make it again."
    )


def _digest(path: Path, entry: FileEntry, unless_checked_before: bool) -> str:
    key, before = (path.absolute(), entry.sha256), _seen(path)
    if unless_checked_before and _sound.get(key) == before:
        return entry.sha256
    digest = hash_file(path)
    is_settled = max(before[1:3]) / 1e9 < time.time() - _SETTLED_SECONDS
    if digest == entry.sha256 and is_settled and _seen(path) == before:
        _sound[key] = before
    return digest


def _seen(path: Path) -> _Seen:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev
