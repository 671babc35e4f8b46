"""The files of a corpus: found by path, directory, glob or URI, fetched when they lie in a store, hashed."""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePath, PurePosixPath

from relora_train.checkpoints.manifest import hash_file
from relora_train.data.left_out import Fault
from relora_train.errors import SourceUnreadableError
from relora_train.storage.base import ObjectInfo, ObjectStore
from relora_train.storage.durable import disk_error
from relora_train.storage.opening import open_store, uri_to_path
from relora_train.storage.workspace import cache_root

_log = logging.getLogger("relora_train.data.sources")

# The files that a directory or prefix contributes; one that is named itself, or by a glob, may be called anything.
_ENDINGS = {
    "text": ("",),
    "jsonl": tuple(f"{name}{ending}" for ending in ("", ".gz", ".zst") for name in (".jsonl", ".json", ".ndjson")),
    "csv": (".csv", ".csv.gz", ".csv.zst"),
    "parquet": (".parquet",),
    "idx": ("-ubyte", "-ubyte.gz"),
}
_UNSUPPORTED_COMPRESSION = (".bz2", ".xz", ".lz4", ".zip", ".tar")


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
    def of(cls, path: Path, name: str) -> "SourceFile":
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


@dataclass(frozen=True)
class FoundFile:
    """A file or an object that data.paths names, not read yet."""

    name: str
    """How the user knows it: a path or a URI."""

    identity: str
    """The real path or the URI: two names with one identity are one file."""

    stored: tuple[ObjectStore, ObjectInfo] | None = None
    """The address, if the file lies in a store."""


def find_files(paths: Iterable[str], kind: str, *, skip: bool = False) -> list[SourceFile]:
    """Return the files of list_files, fetched where they lie in a store, and hashed. Raises the same errors."""
    return [
        _fetched(*file.stored, file.name) if file.stored else SourceFile.of(Path(file.name), file.name)
        for file in list_files(paths, kind, skip=skip)
    ]


def list_files(paths: Iterable[str], kind: str, *, skip: bool = False) -> list[FoundFile]:
    """Return the files that `paths` name, each once, in the order of `paths` and sorted within each of them.

    Nothing is read or fetched. A file has one name, however many links and paths lead to it; what was left out is
    counted in a warning. skip: take compressed files too, which reading leaves out. Raises
    SourceUnreadableError where a path names no file, and what a store raises.
    """
    found: dict[str, FoundFile] = {}
    left_out: list[str] = []
    for path in paths:
        in_store = "://" in path and not path.startswith("file:")
        try:
            named = _in_store(path, kind) if in_store else _on_disk(path, kind, left_out)
        except OSError as error:
            raise SourceUnreadableError(
                f"{error.filename or path} cannot be read: {error.strerror}. Let this user read it."
            ) from None
        for file in named:
            if file.identity in found:
                left_out.append(file.name)
            else:
                found[file.identity] = file
    if left_out:
        warn_once(
            f"data.paths: {len(left_out)} name{'s' if len(left_out) > 1 else ''} left out, {len(found)} files taken. "
            f"A file counts once, whatever links or further paths lead to it. The first left out: {left_out[0]}"
        )
    try:
        for name in () if skip else (file.name for file in found.values()):
            check_compression(name, kind)
    except Fault as fault:
        raise SourceUnreadableError(str(fault)) if kind == "idx" else fault.as_error() from None
    return list(found.values())


def check_compression(name: str, kind: str) -> None:
    """Return only if this library reads files of such a name. Raises Fault."""
    if name.endswith((*_UNSUPPORTED_COMPRESSION, *((".zst",) if kind in ("idx", "parquet") else ()))):
        read = (
            "plain files"
            if kind == "parquet"
            else "plain files or .gz"
            if kind == "idx"
            else "plain files, .gz or .zst"
        )
        raise Fault(f"{name} is compressed in a way that is not read; use {read}.", "compressed", "files")


def _on_disk(path: str, kind: str, left_out: list[str]) -> list[FoundFile]:
    """Return the files of one path, sorted. Links come to `left_out` when their file is found without them."""
    place = uri_to_path(path) if path.startswith("file:") else Path(path).expanduser()
    if place.is_dir():
        inside = [folder / name for folder, names in _folders(place) for name in names if _belongs(Path(name), kind)]
        files = sorted((file for file in inside if file.is_file()), key=Path.as_posix)
    elif place.is_file():
        files = inside = [place]
    else:
        inside = [*set(_matching(Path(place.anchor), place.relative_to(place.anchor).parts, left_out))]
        files = sorted(file for file in inside if file.is_file())
    if broken := sorted(str(file) for file in inside if file.is_symlink() and not file.exists()):
        warn_once(f"Links that lead to nothing are left out, {len(broken)} in all. The first: {broken[0]}")
    if not files:
        raise _nothing_found(path, kind, exists=place.is_dir())
    real_folder = cache(os.path.realpath)
    found: dict[str, FoundFile] = {}
    for file in sorted(files, key=Path.is_symlink):  # a link to a file that is here too changes nothing
        identity = os.path.realpath(file) if file.is_symlink() else f"{real_folder(file.parent)}{os.sep}{file.name}"
        if identity in found:
            left_out.append(str(file))
        else:
            found[identity] = FoundFile(str(file), identity)
    order = {str(file): number for number, file in enumerate(files)}
    return sorted(found.values(), key=lambda file: order[file.name])


def _matching(place: Path, parts: tuple[str, ...], left_out: list[str]) -> Iterator[Path]:
    """Yield what glob.glob finds, except that '**' enters no folder twice: glob follows a link to '.' 40 times."""
    if not parts:
        yield place
    elif parts[0] == "**":
        for folder, names in _folders(place, left_out) if place.is_dir() else ():
            if parts[1:]:
                yield from _matching(folder, parts[1:], left_out)
            else:
                yield from (folder / name for name in names)
    else:
        for name in glob.glob(parts[0], root_dir=place):  # noqa: PTH207  # Path.glob takes hidden files too
            yield from _matching(place / name, parts[1:], left_out)


def _folders(place: Path, left_out: list[str] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those below it, each once, with their files; hidden ones are passed over.

    Links to folders are followed if there is a list for those that lead to one that was entered already. They come
    last, so that a folder is known by its own name.
    """

    def unlisted(error: OSError) -> None:
        warn_once(f"{error.filename} cannot be listed ({error.strerror}): nothing in it is taken.")

    entered: set[str] = set()
    waiting, links = [place], list[Path]()
    while waiting:
        start = waiting.pop(0)
        for path, inner, names in os.walk(start, onerror=unlisted):
            folder, real = Path(path), os.path.realpath(path)
            if real in entered:
                inner.clear()
                if left_out is not None and folder == start:
                    left_out.append(str(folder))
                continue
            entered.add(real)
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            links += [folder / name for name in inner if (folder / name).is_symlink()]
            if left_out is not None:
                waiting, links = waiting + links, []
            yield folder, [name for name in names if not name.startswith(".")]
    for link in (link for link in links if os.path.realpath(link) not in entered):
        warn_once(f"{link} is a link to a directory, and not followed. To take it, name it, or {place}/**.")


@cache
def warn_once(message: str) -> None:
    """A run looks for its files up to three times."""
    _log.warning("%s", message)


def _in_store(uri: str, kind: str) -> list[FoundFile]:
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    store = open_store(f"{scheme}://{bucket}")
    if any(character in key for character in "*?["):
        literal = key[: min(key.index(character) for character in "*?[" if character in key)]
        found = [info for info in store.list(literal) if fnmatchcase(info.key, key)]
        if "**" not in key:  # as on a disk, '*' stays within a folder
            found = [info for info in found if info.key.count("/") == key.count("/")]
    elif key and not key.endswith("/") and (info := store.head(key)):
        found = [info]
    else:
        folder = f"{key.rstrip('/')}/" if key else ""
        found = [info for info in store.list(folder) if _belongs(PurePosixPath(info.key.removeprefix(folder)), kind)]
    if not found:
        raise _nothing_found(uri, kind, exists=False)
    return [FoundFile(name, name, (store, info)) for info in found for name in [f"{store.uri}/{info.key}"]]


def _belongs(name: PurePath, kind: str) -> bool:
    return name.name.endswith(_ENDINGS[kind]) and not any(part.startswith(".") for part in name.parts)


def _nothing_found(path: str, kind: str, *, exists: bool) -> SourceUnreadableError:
    endings = " or ".join(_ENDINGS[kind]) if _ENDINGS[kind] != ("",) else "any"
    why = f"holds no file for source {kind!r} ({endings})" if exists else "names no file, directory, glob or prefix"
    return SourceUnreadableError(f"{path} {why}. Correct data.paths, or put the files there.")


def _fetched(store: ObjectStore, info: ObjectInfo, name: str) -> SourceFile:
    """Return the object as a file of the cache, downloaded once for each etag."""
    cache = cache_root() / "sources"
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
