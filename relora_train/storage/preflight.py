"""The probe behind every store's preflight(): can it be written, and does it honour conditions?

Lists of "S3-compatible" stores are not to be trusted: of four servers tried two ignored If-None-Match silently, one
only If-Match, and some MinIO releases accept If-Match on an object that is not there. Each step below catches one.
Others do not know the checksums that are sent with a request, and store them with the object.
"""

from __future__ import annotations

import secrets

from relora_train.errors import PreconditionFailedError, UnsafeStoreError
from relora_train.storage.base import ObjectStore

CHECKSUM_ADVICE = (
    "Set AWS_REQUEST_CHECKSUM_CALCULATION=when_required, so that requests carry no checksum where S3 does not ask for "
    "one (every file is still read by its SHA-256), or upgrade this server."
)


def probe_conditions(store: ObjectStore) -> None:
    """Return only if what is written is read back and racing commits have one winner; else raise UnsafeStoreError.

    Writes under `preflight/` with a random name, and removes what it wrote also when it fails.
    Not covered: whether conditions are atomic under a race (a single client cannot see that).
    """
    nonce = secrets.token_hex(8)
    key, absent_key = f"preflight/{nonce}", f"preflight/{nonce}-absent"
    first = f"first {nonce}".encode()
    etag = store.put_bytes(key, first, if_absent=True)
    try:
        if (found := store.get_bytes(key)[0]) != first:
            raise _altering(store, first, found)
        if _accepted(store, key, if_absent=True):
            raise _unsafe(store, "overwrote an object that had to be absent (If-None-Match is ignored)")
        if _accepted(store, key, if_match='"0000000000000000000000000000000a"'):
            raise _unsafe(store, "overwrote an object whose etag did not match (If-Match is ignored)")
        if _accepted(store, absent_key, if_match=etag):
            raise _unsafe(store, "created an object that had to exist with a given etag (If-Match is half ignored)")
        if not _accepted(store, key, if_match=etag):
            raise _unsafe(store, "refused to replace an object whose etag did match (If-Match is not supported)")
    finally:
        store.delete(key)
        store.delete(absent_key)


def _accepted(store: ObjectStore, key: str, *, if_absent: bool = False, if_match: str | None = None) -> bool:
    try:
        store.put_bytes(key, f"second {secrets.token_hex(8)}".encode(), if_absent=if_absent, if_match=if_match)
    except PreconditionFailedError:
        return False
    return True


def _altering(store: ObjectStore, written: bytes, found: bytes) -> UnsafeStoreError:
    if written in found:
        return UnsafeStoreError(
            f"{store.uri} stored {len(found)} bytes where {len(written)} were written: it keeps the framing of an "
            f"upload with a checksum (aws-chunked) as part of the object. {CHECKSUM_ADVICE}"
        )
    return UnsafeStoreError(
        f"{store.uri} gave back other bytes than were written ({len(found)}, not {len(written)}), so no checkpoint "
        "would be whole there. Look for a proxy that changes what passes, or use another store."
    )


def _unsafe(store: ObjectStore, what: str) -> UnsafeStoreError:
    return UnsafeStoreError(
        f"{store.uri} {what}, so two writers of one checkpoint could mix their files unnoticed. "
        "Use a store with conditional writes (AWS S3, Cloudflare R2, SeaweedFS >= 4.17, a local directory), "
        "or upgrade this server."
    )
