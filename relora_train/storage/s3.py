"""A bucket of any S3-compatible server as a store. See s3_client.py for endpoint, region and credentials.

botocore refreshes credentials that expire. If a request is denied, the credentials are looked up again; if they have
changed, as a rotated key in ~/.aws/credentials does, a new client repeats the request. An outage that outlasts a call's
attempts raises StoreUnavailableError, which is cheap to retry from outside.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from relora_train.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ObjectNotFoundError,
    PreconditionFailedError,
    ReLoRAError,
)
from relora_train.storage.base import KEY, ObjectInfo, ObjectStore, check_key, check_small, find_bytes
from relora_train.storage.durable import disk_error
from relora_train.storage.s3_client import (
    code_and_status,
    download,
    is_worth_repeating,
    keys_of,
    make_client,
    retries_made,
    storage_error,
    transfers,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import PutObjectRequestTypeDef
    from s3transfer.futures import TransferFuture

_log = logging.getLogger("relora_train.storage.s3")

_REPEATS = 5
"""Attempts at what botocore does not retry: 409, BadDigest, a body cut while it was read."""

T = TypeVar("T")


class S3Store(ObjectStore):
    """Keeps the contract of ObjectStore on a bucket, or on a prefix of one. Safe to share between threads."""

    def __init__(self, bucket: str, prefix: str = "", *, page_size: int = 1000) -> None:
        self._bucket = bucket
        self._root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._page_size = page_size
        self._bucket_was_seen = False
        self._uploads: set[TransferFuture] = set()
        self._renewing = threading.Lock()

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._root}".rstrip("/")

    @property
    def is_remote(self) -> bool:
        return True

    @functools.cached_property
    def _client(self) -> S3Client:
        """Made by the first request, so that opening a store reads no configuration and cannot fail."""
        return make_client()

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        def get() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._root + key)
            # closing(): as its own context manager the body would give its raw stream, which verifies no checksum.
            with closing(answer["Body"]) as body:
                check_small(answer["ContentLength"], self._uri_of(key))
                return body.read(), answer["ETag"]

        return self._call(check_key(key), get)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write as the contract says. A retry that meets our own write, because its answer was lost, is a success.

        The bytes tell our own write from a rival's, so racing writers must put something random in them.
        """
        request: PutObjectRequestTypeDef = {"Bucket": self._bucket, "Key": self._root + check_key(key), "Body": data}
        if if_absent:
            request["IfNoneMatch"] = "*"
        elif if_match is not None:
            request["IfMatch"] = if_match
        calls = 0

        def put() -> str:
            nonlocal calls
            calls += 1
            return self._client.put_object(**request)["ETag"]

        try:
            return self._call(key, put)
        except BucketNotFoundError:
            raise
        except (PreconditionFailedError, ObjectNotFoundError) as error:  # 404: If-Match on an absent key
            if calls > 1 or (error.__cause__ is not None and retries_made(error.__cause__) > 0):
                found = find_bytes(self, key)
                if found is not None and found[0] == data:
                    return found[1]
            if isinstance(error, PreconditionFailedError):
                raise
            raise PreconditionFailedError(f"{self._uri_of(key)} is gone: another writer deleted it.") from error

    def page_link(self, key: str, seconds: int) -> str | None:
        asked = {"Bucket": self._bucket, "Key": self._root + check_key(key), "ResponseContentType": "text/html"}
        sign = self._client.generate_presigned_url
        return self._call(key, lambda: sign("get_object", Params=asked, ExpiresIn=seconds))

    def put_file(self, key: str, path: Path) -> None:
        def put() -> bool:
            """Upload as boto3's upload_file does, in a way that cancel_uploads can end."""
            with transfers(self._client) as manager:
                upload = manager.upload(str(path), self._bucket, self._root + key)
                self._uploads.add(upload)
                try:
                    upload.result()
                finally:
                    self._uploads.discard(upload)
            return True

        if not self._find(check_key(key), put):
            self._call(key, put)  # NoSuchUpload: some servers have forgotten an upload whose end they were told

    def cancel_uploads(self) -> None:
        for upload in tuple(self._uploads):
            upload.cancel()

    def get_file(self, key: str, path: Path) -> None:
        def get() -> None:
            try:
                download(self._client, self._bucket, self._root + key, path)
            except ConnectionError:
                raise
            except OSError as error:
                raise disk_error(error, f"write {path} from {self._uri_of(key)}") from error

        self._call(check_key(key), get)

    def head(self, key: str) -> ObjectInfo | None:
        full_key = self._root + check_key(key)
        answer = self._find(key, lambda: self._client.head_object(Bucket=self._bucket, Key=full_key))
        return answer and ObjectInfo(key, answer["ContentLength"], answer["ETag"], answer["LastModified"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        def list_all() -> tuple[ObjectInfo, ...]:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._root + prefix, PaginationConfig={"PageSize": self._page_size}
            )
            return tuple(
                ObjectInfo(found["Key"].removeprefix(self._root), found["Size"], found["ETag"], found["LastModified"])
                for page in pages
                for found in page.get("Contents", ())
            )

        # Sorted here: SeaweedFS lists 'a/b' before 'a-b'. Names that no call accepts ("folder/") are not ours.
        found = self._call(prefix, list_all)
        yield from sorted((info for info in found if KEY.fullmatch(info.key)), key=lambda info: info.key)

    def delete(self, key: str) -> None:
        # S3 itself answers 204; others say 404, also to a retry of their own success.
        full_key = self._root + check_key(key)
        self._find(key, lambda: self._client.delete_object(Bucket=self._bucket, Key=full_key))

    def abort_stale_uploads(self, older_than: datetime, *, prefix: str = "", dry_run: bool = False) -> Sequence[str]:
        def list_stale() -> list[tuple[str, str]]:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._root + prefix
            )
            return [
                (upload["Key"], upload["UploadId"])
                for page in pages
                for upload in page.get("Uploads", ())
                if upload["Initiated"] < older_than and upload["Key"].startswith(self._root + prefix)
            ]

        def abort(full_key: str, upload_id: str) -> None:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=full_key, UploadId=upload_id)

        stale = self._call(prefix, list_stale)
        for key, upload_id in () if dry_run else stale:
            with suppress(ObjectNotFoundError):  # finished or aborted by now
                self._call(key.removeprefix(self._root), functools.partial(abort, key, upload_id))
        return sorted(key.removeprefix(self._root) for key, _ in stale)

    def _call(self, key: str, request: Callable[[], T]) -> T:
        """Make a request; if it is denied and the credentials have changed since, make it again with the new ones."""
        client = self._client
        try:
            return self._repeat(key, request)
        except AccessDeniedError:
            if not self._renew(client):
                raise
        return self._repeat(key, request)

    def _find(self, key: str, request: Callable[[], T]) -> T | None:
        """Make a request as `_call` does; None if its object is not there. A missing bucket raises."""
        try:
            return self._call(key, request)
        except BucketNotFoundError:
            raise
        except ObjectNotFoundError:
            return None

    def _repeat(self, key: str, request: Callable[[], T]) -> T:
        """Make a request, repeating it if that can help. Raise its failure as one of our errors."""
        for attempt in range(_REPEATS):
            try:
                return request()
            except ReLoRAError:
                raise
            except Exception as error:
                if attempt == _REPEATS - 1 or not is_worth_repeating(error):
                    # A HEAD says only 404, and some servers name the key even when the bucket is missing.
                    missing = code_and_status(error)[1] == 404 and not self._bucket_exists()
                    endpoint = self._client.meta.endpoint_url
                    ours = storage_error(error, uri=self._uri_of(key), endpoint=endpoint, bucket_is_missing=missing)
                    if ours is None:
                        raise
                    raise ours from error
            time.sleep(0.1 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _renew(self, denied: S3Client) -> bool:
        """Replace the denied client if the credentials have changed; return True if there is another one by now.

        The old client stays open: other threads may be in the middle of a request.
        """
        with self._renewing:
            if self._client is denied:
                try:
                    fresh = make_client()
                except ReLoRAError:  # such as a file that is just being written
                    return False
                if keys_of(fresh) == keys_of(denied):
                    fresh.close()
                    return False
                self._client = fresh
                _log.info("%s: the credentials have changed, and the new ones are used.", self.uri)
        return True

    def _bucket_exists(self) -> bool:
        """Return False only if the server says so; being denied is no proof. Remembered once true."""
        if not self._bucket_was_seen:
            try:
                self._client.head_bucket(Bucket=self._bucket)
            except Exception as error:
                return code_and_status(error)[1] != 404
            self._bucket_was_seen = True
        return True
