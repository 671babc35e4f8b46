"""The contract every store keeps. One test suite (tests/test_storage_contract.py) runs over all of them.

Keys are relative, '/'-separated, made of [A-Za-z0-9._-] segments with no leading dot: the same key means the same
object on a case-sensitive disk and in a bucket, and no key can leave the store's root.
"""

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from relora_train.errors import (
    BucketNotFoundError,
    CheckpointCorruptError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    UnsafeStoreError,
)

KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")

CHECKSUM_ADVICE = (
    "Set AWS_REQUEST_CHECKSUM_CALCULATION=when_required, so that requests carry no checksum where S3 does not ask for "
    "one (every file is still read by its SHA-256), or upgrade this server."
)
SMALL_OBJECT_BYTES = 64 << 20
"""Nothing that is read whole into memory has more: manifests, leases, refs, records."""


@dataclass(frozen=True)
class ObjectInfo:
    """The facts of one object, as a listing or a head gives them."""

    key: str
    size_bytes: int
    etag: str
    modified_at: datetime
    """Timezone-aware, UTC."""


class ObjectStore(Protocol):
    """Named immutable-or-conditionally-replaced byte strings.

    Errors, for every call: AccessDeniedError, StoreUnavailableError, BucketNotFoundError, DiskFullError;
    ObjectNotFoundError where a named object must exist.
    """

    @property
    def uri(self) -> str:
        """The root without trailing slash: 'file:///data/relora', 's3://bucket/prefix', 'memory://name'."""

    @property
    def is_remote(self) -> bool:
        """True if writes go over a network, so that they are worth doing beside other work."""
        return False

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        """Return content and etag of a small object. Raise ObjectNotFoundError if there is none.

        An object above SMALL_OBJECT_BYTES raises CheckpointCorruptError before anything of it is read.
        """

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write a small object atomically and return its etag.

        if_absent: only when no object has this key; if_match: only when its etag is this one. Exactly one of many
        racing writers succeeds; the others get PreconditionFailedError.
        """

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file with bounded memory. Readers see all of it or nothing. Replaces what was there."""

    def cancel_uploads(self) -> None:
        """End what put_file of this very object is doing on other threads, with an error there and nothing visible.

        For a process that is about to end: parts that are on their way are still waited for, the rest is not sent. A
        store whose writes are short does nothing.
        """
        return

    def get_file(self, key: str, path: Path) -> None:
        """Download to `path` with bounded memory. Not verified here: the caller compares size and SHA-256."""

    def head(self, key: str) -> ObjectInfo | None:
        """Return the facts of one object, or None if it does not exist."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix` (any string), by key: exactly those that get would find."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""

    def abort_stale_uploads(self, older_than: datetime, *, prefix: str = "", dry_run: bool = False) -> Sequence[str]:
        """Remove what killed writers left half uploaded below a prefix and began before a moment of the store's clock.

        Returns their names, sorted. No listing shows these, and no object is touched. dry_run: only names them.
        """

    def local_path(self, key: str) -> Path | None:
        """Return the object's path on this machine if the store is a directory, else None."""
        check_key(key)
        return None

    def page_link(self, key: str, seconds: int) -> str | None:
        """Return an address at which any browser opens a page for so long, or None for a store that cannot make one.

        Whoever has the address can read the object. Nothing is asked of the store.
        """
        check_key(key)
        return None

    def preflight(self) -> None:
        """Return only if what is written is read back and racing commits have one winner; else raise UnsafeStoreError.

        Lists of "S3-compatible" stores are not to be trusted: of four servers tried two ignored If-None-Match silently,
        one only If-Match, and some MinIO releases accept If-Match on an object that is not there. Others do not know
        the checksums that are sent with a request, and store them with the object. Each step catches one.
        Takes a few requests, and removes what it wrote also when it fails.
        Not covered: whether conditions are atomic under a race (a single client cannot see that).
        """
        nonce = secrets.token_hex(8)
        key, absent_key, first = f"preflight/{nonce}", f"preflight/{nonce}-absent", f"first {nonce}".encode()

        def accepts(written_key: str, *, if_absent: bool = False, if_match: str | None = None) -> bool:
            data = f"second {secrets.token_hex(8)}".encode()
            try:
                self.put_bytes(written_key, data, if_absent=if_absent, if_match=if_match)
            except PreconditionFailedError:
                return False
            return True

        etag, fault = self.put_bytes(key, first, if_absent=True), ""
        try:
            found = self.get_bytes(key)[0]
            if found != first and first in found:
                raise UnsafeStoreError(
                    f"{self.uri} stored {len(found)} bytes where {len(first)} were written: it keeps the framing of an "
                    f"upload with a checksum (aws-chunked) as part of the object. {CHECKSUM_ADVICE}"
                )
            if found != first:
                raise UnsafeStoreError(
                    f"{self.uri} gave back other bytes than were written ({len(found)}, not {len(first)}), so no "
                    "checkpoint would be whole there. Look for a proxy that changes what passes, or use another store."
                )
            if accepts(key, if_absent=True):
                fault = "overwrote an object that had to be absent (If-None-Match is ignored)"
            elif accepts(key, if_match='"0000000000000000000000000000000a"'):
                fault = "overwrote an object whose etag did not match (If-Match is ignored)"
            elif accepts(absent_key, if_match=etag):
                fault = "created an object that had to exist with a given etag (If-Match is half ignored)"
            elif not accepts(key, if_match=etag):
                fault = "refused to replace an object whose etag did match (If-Match is not supported)"
        finally:
            self.delete(key)
            self.delete(absent_key)
        if fault:
            raise UnsafeStoreError(
                f"{self.uri} {fault}, so two writers of one checkpoint could mix their files unnoticed. "
                "Use a store with conditional writes (AWS S3, Cloudflare R2, SeaweedFS >= 4.17, a local directory), "
                "or upgrade this server."
            )

    def _uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}"


def check_key(key: str) -> str:
    """Return the key, or refuse one that could leave the root or mean two things on two systems."""
    if not KEY.fullmatch(key):
        raise StorageError(
            f"{key!r} is not a valid object key: use segments of letters, digits, '.', '_' and '-' "
            "that do not start with a dot, separated by '/'."
        )
    return key


def check_small(size_bytes: int, uri: str) -> None:
    """Refuse to read an object whole that nothing of this project wrote."""
    if size_bytes > SMALL_OBJECT_BYTES:
        raise CheckpointCorruptError(
            f"{uri} has {size_bytes:,} bytes, where a manifest or a record has at most {SMALL_OBJECT_BYTES:,}: "
            "something else was written in its place. It is not read. Restore or delete it."
        )


def parse_json(data: bytes) -> Any:
    """Return what an object of a store says. ValueError for what is no JSON, or is nested beyond any use."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def find_bytes(store: ObjectStore, key: str) -> tuple[bytes, str] | None:
    """Return content and etag of a small object, or None if there is none. A missing bucket raises."""
    try:
        return store.get_bytes(key)
    except BucketNotFoundError:
        raise
    except ObjectNotFoundError:
        return None


def put_json(store: ObjectStore, key: str, record: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
    """Write a record as readable JSON and return its etag; conditions as for put_bytes."""
    return store.put_bytes(key, (json.dumps(record, indent=1) + "\n").encode(), if_absent=if_absent, if_match=if_match)


def find_json(store: ObjectStore, key: str) -> dict[str, Any] | None:
    """Return the JSON object at a key; None if there is none, or if it is damaged."""
    try:
        record = parse_json(store.get_bytes(key)[0])
    except (ObjectNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None
