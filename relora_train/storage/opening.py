"""Open the store that a URI names. Only an s3:// URI imports boto3."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from relora_train.errors import StorageError, UnknownStoreSchemeError
from relora_train.storage.base import ObjectStore
from relora_train.storage.redaction import refuse_secrets, without_secrets

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ALLOWED = "Allowed are a directory path, file:///directory, s3://bucket/prefix and memory://name."


def open_store(uri: str | Path) -> ObjectStore:
    """Return the store that a URI names. It needs no network until its first call.

    A path or file:// is a directory on this machine, made on first write. s3:// takes endpoint and credentials only
    from the standard AWS environment and configuration files. memory:// is shared by name within the process.
    """
    text = str(uri) if isinstance(uri, Path) else refuse_secrets(uri)
    match = None if isinstance(uri, Path) else _SCHEME.match(text)
    scheme = match.group(1).lower() if match else "file"
    if scheme == "file":
        from relora_train.storage.local import LocalStore

        root = uri_to_path(text) if match else Path(text).expanduser()
        if root.exists() and not root.is_dir():
            raise StorageError(f"{text} is a file, and a store is a directory. Name the directory it should be.")
        return LocalStore(root)
    if scheme == "memory":
        from relora_train.storage.memory import MemoryStore

        return MemoryStore.shared(text.partition("://")[2].rstrip("/"))
    if scheme == "s3":
        from relora_train.storage.s3 import S3Store

        bucket, _, prefix = text.partition("://")[2].partition("/")
        if not bucket:
            raise UnknownStoreSchemeError(f"{text!r} names no bucket. {_ALLOWED}")
        return S3Store(bucket, prefix)
    raise UnknownStoreSchemeError(f"{without_secrets(text)!r} has the unknown scheme {scheme!r}. {_ALLOWED}")


def uri_to_path(uri: str) -> Path:
    """Return the directory that a file:// URI names. A host other than this machine is refused."""
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise UnknownStoreSchemeError(
            f"{uri!r} names the host {parts.netloc!r}; a file URI has three slashes: "
            f"file:///{parts.netloc}{parts.path}. {_ALLOWED}"
        )
    # Not parts.path: '#' and '?' are ordinary characters in a hand-written path.
    return Path(unquote(uri.partition("://")[2].removeprefix("localhost")))
