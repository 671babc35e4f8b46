"""The files of a corpus: found by path, directory, glob or URI, fetched when they lie in a store, hashed. Light."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath

from relora_train.errors import SourceUnreadableError
from relora_train.manifest import hash_file
from relora_train.storage.base import ObjectInfo, ObjectStore
from relora_train.storage.opening import open_store, uri_to_path
from relora_train.storage.os_errors import disk_error
from relora_train.workspace import cache_root

_log = logging.getLogger("relora_train.corpus.sources")

# What a directory or prefix contributes; a file that is named itself, or by a glob, may be called anything.
_ENDINGS = {
    "text": ("",),
    "jsonl": (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz"),
    "parquet": (".parquet",),
    "idx": ("-ubyte", "-ubyte.gz"),
}
_UNSUPPORTED_COMPRESSION = (".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar")


@dataclass(frozen=True)
class SourceFile:
    """A file on this machine's disk whose content is known by its digest."""

    path: Path
    name: str
    """How the user knows it: a path or a URI."""

    size_bytes: int
    modified_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str) -> SourceFile:
        """Hash a file. Raises SourceUnreadableError."""
        try:
            before = path.stat()
            return cls(path, name, before.st_size, before.st_mtime_ns, hash_file(path))
        except OSError as error:
            raise SourceUnreadableError(f"{name} cannot be read: {error.strerror}. Let this user read it.") from None

    def check_unchanged(self) -> None:
        """Return only if the file still looks as it did when it was hashed."""
        found = self.path.stat() if self.path.exists() else None
        if found is None or (found.st_size, found.st_mtime_ns) != (self.size_bytes, self.modified_ns):
            raise SourceUnreadableError(
                f"{self.name} changed while it was being prepared, so its digest no longer names its content. "
                "Run again when nothing writes to it."
            )


def find_files(paths: Iterable[str], kind: str, cache_directory: Path | None = None) -> list[SourceFile]:
    """The files that `paths` name, each once, in the order of `paths` and sorted within each of them.

    Raises SourceUnreadableError where one of them names no file, and what a store raises.
    """
    cache = (cache_directory or cache_root()) / "sources"
    found: dict[str, SourceFile] = {}
    for path in paths:
        if "://" in path and not path.startswith("file:"):
            for store, info in _in_store(path, kind):
                name = f"{store.uri}/{info.key}"
                if name not in found:
                    found[name] = _fetched(store, info, _readable(name), cache)
        else:
            for file in _on_disk(path, kind):
                if str(file) not in found:
                    found[str(file)] = SourceFile.of(file, _readable(str(file)))
    return list(found.values())


def _on_disk(path: str, kind: str) -> list[Path]:
    place = uri_to_path(path) if path.startswith("file:") else Path(path).expanduser()
    if place.is_dir():
        inside = ((file, file.relative_to(place)) for file in place.rglob("*") if file.is_file())
        chosen = [(name.as_posix(), file) for file, name in inside if _belongs(name, kind)]
        files = [file for _, file in sorted(chosen)]
    elif place.is_file():
        files = [place]
    else:
        matches = glob.glob(str(place), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
        files = sorted(file for file in map(Path, matches) if file.is_file())
    if not files:
        raise _nothing_found(path, kind, exists=place.is_dir())
    return files


def _in_store(uri: str, kind: str) -> list[tuple[ObjectStore, ObjectInfo]]:
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    store = open_store(f"{scheme}://{bucket}")
    if any(character in key for character in "*?["):
        literal = key[: min(key.index(character) for character in "*?[" if character in key)]
        found = [info for info in store.list(literal) if _matches(info.key, key)]
    elif key and not key.endswith("/") and (info := store.head(key)):
        found = [info]
    else:
        folder = f"{key.rstrip('/')}/" if key else ""
        found = [info for info in store.list(folder) if _belongs(PurePosixPath(info.key.removeprefix(folder)), kind)]
    if not found:
        raise _nothing_found(uri, kind, exists=False)
    return [(store, info) for info in found]


def _belongs(name: PurePath, kind: str) -> bool:
    return name.name.endswith(_ENDINGS[kind]) and not any(part.startswith(".") for part in name.parts)


def _matches(key: str, pattern: str) -> bool:
    """As on a disk: '*' stays within a folder, '**' does not."""
    return fnmatchcase(key, pattern) and ("**" in pattern or key.count("/") == pattern.count("/"))


def _readable(name: str) -> str:
    if name.endswith(_UNSUPPORTED_COMPRESSION):
        raise SourceUnreadableError(f"{name} is compressed in a way that is not read; use plain files or .gz.")
    return name


def _nothing_found(path: str, kind: str, *, exists: bool) -> SourceUnreadableError:
    endings = " or ".join(_ENDINGS[kind]) if _ENDINGS[kind] != ("",) else "any"
    why = f"holds no file for source {kind!r} ({endings})" if exists else "names no file, directory, glob or prefix"
    return SourceUnreadableError(f"{path} {why}. Correct data.paths, or put the files there.")


def _fetched(store: ObjectStore, info: ObjectInfo, name: str, cache: Path) -> SourceFile:
    """The object as a file of the cache, downloaded once for each etag."""
    place = cache / hashlib.sha256(f"{name}\n{info.etag}\n{info.size_bytes}".encode()).hexdigest()
    record = place.with_suffix(".json")
    if place.is_file() and record.is_file():
        cached = SourceFile(place, name, **json.loads(record.read_text()))
        if place.stat().st_size == cached.size_bytes and place.stat().st_mtime_ns == cached.modified_ns:
            return cached
    _log.info("Fetching %s (%.1f MB).", name, info.size_bytes / 1e6)
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        store.get_file(info.key, part)
        after = store.head(info.key)
        if after is None or after.etag != info.etag or part.stat().st_size != info.size_bytes:
            raise SourceUnreadableError(f"{name} changed while it was fetched. Run again when nothing writes to it.")
        part.replace(place)
        file = SourceFile.of(place, name)
        facts = {"size_bytes": file.size_bytes, "modified_ns": file.modified_ns, "sha256": file.sha256}
        part.write_text(json.dumps(facts))
        part.replace(record)
    except OSError as error:
        raise disk_error(error, f"write {error.filename or cache} from {name}") from error
    finally:
        part.unlink(missing_ok=True)
    return file
