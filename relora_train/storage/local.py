"""A directory on this machine as a store. Several processes may share it; several machines may not.

Every write goes to a dot-named temporary file in the target's own directory, is fsynced, and appears under its key in
one step: readers see all of an object or none of it, also after a power cut. Dot names are never listed.
Not covered: NFS (flock does not hold between hosts everywhere), file systems without hard links (exFAT).
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from relora_train.errors import ObjectNotFoundError, PreconditionFailedError, StorageError
from relora_train.storage.base import ObjectInfo, ObjectStore, check_key, check_small
from relora_train.storage.durable import disk_error, locked, sync

_HASHED_UP_TO_BYTES = 64 * 1024
"""Etags of small objects are digests; hashing a whole checkpoint for a listing would be absurd."""
_COPY_CHUNK_BYTES = 4 << 20
_TEMPORARY_NAME = re.compile(r"\.tmp-[0-9a-f]{16}")
_LISTED_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class LocalStore(ObjectStore):
    """Keeps the contract of ObjectStore on a local file system with hard links."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.normpath(root.absolute()))  # not resolve(): a symlinked root keeps its stable name

    @property
    def uri(self) -> str:
        return self._root.as_uri().rstrip("/")

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        with self._translated("read", key), self._path(key).open("rb") as stream:
            check_small(os.fstat(stream.fileno()).st_size, self._uri_of(key))
            data = stream.read()
            return data, _etag(os.fstat(stream.fileno()), data)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        path = self._path(key)
        with self._translated("write", key), self._spooled(path) as (temporary, stream):
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            # Inode and mtime survive link and rename, so this is also the etag under the final name.
            etag = _etag(os.fstat(stream.fileno()), data)
            with locked(self._root / ".lock"):
                if if_absent:
                    try:
                        os.link(temporary, path)  # the one call that is atomic and refuses to overwrite
                    except FileExistsError:
                        raise PreconditionFailedError(
                            f"{self._uri_of(key)} already exists: another writer was first. Read it and use what it "
                            "holds."
                        ) from None
                elif if_match is not None and ((held := _info(key, path)) is None or held.etag != if_match):
                    raise PreconditionFailedError(
                        f"{self._uri_of(key)} was changed by another writer: read it again and decide anew."
                    )
                else:
                    temporary.replace(path)
                sync(path.parent)
        return etag

    def put_file(self, key: str, path: Path) -> None:
        target = self._path(key)
        with path.open("rb") as source, self._translated("write", key), self._spooled(target) as (temporary, stream):
            shutil.copyfileobj(source, stream, _COPY_CHUNK_BYTES)
            stream.flush()
            os.fsync(stream.fileno())
            with locked(self._root / ".lock"):
                temporary.replace(target)
                sync(target.parent)

    def get_file(self, key: str, path: Path) -> None:
        with self._translated("read", key), self._path(key).open("rb") as source:
            try:
                with path.open("wb") as target:
                    shutil.copyfileobj(source, target, _COPY_CHUNK_BYTES)
            except OSError as error:
                raise disk_error(error, f"write {path} from {self._uri_of(key)}") from error

    def head(self, key: str) -> ObjectInfo | None:
        with self._translated("read", key):
            return _info(key, self._path(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        directory = prefix.rpartition("/")[0]  # of the store, only what is below is walked
        keys = []
        with self._translated("list", prefix):
            if not directory or all(_LISTED_NAME.fullmatch(part) for part in directory.split("/")):
                for place, names in self._walk(directory):
                    keys += [f"{place}{name}" for name in names if _LISTED_NAME.fullmatch(name)]
        for key in sorted(key for key in keys if key.startswith(prefix)):
            if info := self.head(key):  # it may have been deleted since
                yield info

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._translated("delete", key):
            if not path.is_file():
                return
            with locked(self._root / ".lock"):
                path.unlink(missing_ok=True)
                sync(path.parent)
                self._remove_empty_parents(path)

    def abort_stale_uploads(self, older_than: datetime, *, prefix: str = "", dry_run: bool = False) -> Sequence[str]:
        found = []
        with self._translated("clean up", prefix):
            for place, names in self._walk(prefix.rpartition("/")[0]):
                if not place.startswith(prefix):
                    continue
                for path in (self._root / place / name for name in names if _TEMPORARY_NAME.fullmatch(name)):
                    with suppress(FileNotFoundError):  # its writer has finished
                        if path.stat().st_mtime < older_than.timestamp():
                            found.append(path.relative_to(self._root).as_posix())
                            if not dry_run:
                                path.unlink()
                                with locked(self._root / ".lock"):
                                    self._remove_empty_parents(path)
        return sorted(found)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _walk(self, directory_key: str) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield each directory at and below one, as the beginning of its keys, with the names of its files."""

        def raise_unless_absent(error: OSError) -> None:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise error

        for directory, names, files in os.walk(self._root / directory_key, onerror=raise_unless_absent):
            names[:] = [name for name in names if _LISTED_NAME.fullmatch(name)]
            place = Path(directory).relative_to(self._root).as_posix()
            yield "" if place == "." else f"{place}/", files

    @contextmanager
    def _spooled(self, path: Path) -> Iterator[tuple[Path, BinaryIO]]:
        """Yield a new temporary file beside `path`, gone afterwards unless it was renamed."""
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
        for _ in range(100):
            try:
                _make_directory(path.parent)
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask
                break
            except FileNotFoundError:
                continue  # a delete has removed the directory in between
        else:
            raise StorageError(
                f"Cannot create files in {path.parent}: something keeps removing it. Look for a clean-up job."
            )
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield temporary, stream
        finally:
            temporary.unlink(missing_ok=True)

    def _remove_empty_parents(self, path: Path) -> None:
        """Remove the directories that a delete left empty. Under the lock; a writer that loses one makes it again."""
        with suppress(OSError):
            for parent in path.parents:
                if parent == self._root:
                    return
                parent.rmdir()

    @contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if verb == "read" and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise ObjectNotFoundError(
                    f"Cannot read {self._uri_of(key)}: it does not exist. List the store to see what does."
                ) from error
            raise disk_error(error, f"{verb} {self._uri_of(key)}") from error


def _make_directory(directory: Path) -> None:
    """Make a directory and those above it. Each new name is on disk before anything is written below it."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync(directory.parent)


def _info(key: str, path: Path) -> ObjectInfo | None:
    try:
        with path.open("rb") as stream:  # one open file: size, time and digest are of the same object
            facts = os.fstat(stream.fileno())
            small = facts.st_size <= _HASHED_UP_TO_BYTES
            etag = _etag(facts, stream.read() if small else b"")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return ObjectInfo(key, facts.st_size, etag, datetime.fromtimestamp(facts.st_mtime, UTC))


def _etag(facts: os.stat_result, data: bytes) -> str:
    if facts.st_size <= _HASHED_UP_TO_BYTES:
        return hashlib.sha256(data).hexdigest()
    return f"{facts.st_size:x}-{facts.st_mtime_ns:x}-{facts.st_ino:x}"
