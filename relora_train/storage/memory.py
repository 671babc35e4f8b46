"""A store in this process's memory: for tests and trials. Gone when the process ends."""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from relora_train.errors import ObjectNotFoundError, PreconditionFailedError
from relora_train.storage.base import ObjectInfo, ObjectStore, check_key, check_small

_shared_stores: dict[str, "MemoryStore"] = {}


class MemoryStore(ObjectStore):
    """Keeps the whole contract between the threads of one process, except bounded memory."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, datetime]] = {}

    @classmethod
    def shared(cls, name: str) -> "MemoryStore":
        """Return the process's one store of this name, made on first use."""
        return _shared_stores.setdefault(name, cls(name))  # one step also between threads

    @property
    def uri(self) -> str:
        return f"memory://{self._name}"

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        data = self._content(key)
        check_small(len(data), f"{self.uri}/{key}")
        return data, _etag(data)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        check_key(key)
        with self._lock:
            current = self._objects.get(key)
            if if_absent and current is not None:
                raise PreconditionFailedError(f"{self.uri}/{key} already exists: another writer was first.")
            if if_match is not None and (current is None or _etag(current[0]) != if_match):
                raise PreconditionFailedError(f"{self.uri}/{key} was changed by another writer: read it again.")
            self._objects[key] = (bytes(data), datetime.now(UTC))
        return _etag(data)

    def put_file(self, key: str, path: Path) -> None:
        self.put_bytes(key, path.read_bytes())

    def get_file(self, key: str, path: Path) -> None:
        path.write_bytes(self._content(key))

    def head(self, key: str) -> ObjectInfo | None:
        found = self._objects.get(check_key(key))
        return None if found is None else ObjectInfo(key, len(found[0]), _etag(found[0]), found[1])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            found = sorted((key, *value) for key, value in self._objects.items() if key.startswith(prefix))
        for key, data, modified_at in found:
            yield ObjectInfo(key, len(data), _etag(data), modified_at)

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)

    def abort_stale_uploads(self, older_than: datetime, *, prefix: str = "", dry_run: bool = False) -> Sequence[str]:
        return ()  # a write is one step

    def _content(self, key: str) -> bytes:
        found = self._objects.get(check_key(key))
        if found is None:
            raise ObjectNotFoundError(f"{self.uri}/{key} does not exist. List the store to see what does.")
        return found[0]


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
