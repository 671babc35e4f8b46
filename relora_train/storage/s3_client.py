"""Clients of S3, as the standard AWS environment and configuration files describe them, and their errors as ours.

Request checksums stay at botocore's default (`when_supported`): without them a flipped bit is stored silently.
A call tries at most RELORA_S3_MAX_ATTEMPTS times (default 8): about a minute when connections are refused.
Missing, denied and temporarily unavailable are three errors with three remedies; only the last may be retried. They are
recognised by class name. A message names the object's full URI and the endpoint, never a key id, a secret or a header.
Only this file imports boto3.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from relora_train.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigError,
    DiskFullError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    StoreUnavailableError,
)
from relora_train.storage.base import CHECKSUM_ADVICE
from relora_train.storage.redaction import holds_secrets, without_secrets

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from mypy_boto3_s3 import S3Client
    from s3transfer.manager import TransferManager

_log = logging.getLogger("relora_train.storage.s3_client")

_PART_BYTES = 64 << 20
_TRANSFER_THREADS = 4
_POOL_CONNECTIONS = 16


def make_client() -> S3Client:
    """Return a client as the standard AWS environment describes it; the region is us-east-1 if none is set."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    attempts = os.environ.get("RELORA_S3_MAX_ATTEMPTS", "8")
    if not attempts.isdigit() or int(attempts) < 1:
        raise ConfigError(f"RELORA_S3_MAX_ATTEMPTS={attempts!r} must be a whole number of at least 1; unset it for 8.")
    settings = Config(
        retries={"mode": "standard", "total_max_attempts": int(attempts)},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=_POOL_CONNECTIONS,
        user_agent_extra="relora-train",
        signature_version="s3v4",  # a link would be signed the old way, which shows the key's id and knows no limit
    )
    invalid = "The S3 settings of this environment are not valid"
    check = "Check AWS_ENDPOINT_URL_S3 and ~/.aws/config."
    try:
        session = boto3.session.Session()
        region = session.region_name or "us-east-1"
        client = session.client("s3", region_name=region, config=settings)
        endpoint = client.meta.endpoint_url
        if holds_secrets(endpoint):  # S3 has no use for them, and botocore's errors repeat the endpoint
            raise ConfigError(
                f"The S3 endpoint {without_secrets(endpoint)} is given with a user name, a password or a query. "
                "Requests are signed with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: set those, and "
                "AWS_ENDPOINT_URL_S3 to scheme, host and port alone."
            )
        chosen = client.meta.config.s3  # type: ignore[attr-defined]  # the stubs leave out this option
        is_aws = (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
        if not is_aws and "addressing_style" not in (chosen or {}):
            client.close()
            by_path = settings.merge(Config(s3={"addressing_style": "path"}))
            client = session.client("s3", region_name=region, config=by_path)
    except BotoCoreError as error:
        denied = storage_error(error, uri="s3://", endpoint="as configured")
        raise denied or ConfigError(f"{invalid}: {error}. {check}") from error
    except ValueError:  # its text is the endpoint as it was written, perhaps with a password
        raise ConfigError(f"{invalid}, probably the endpoint. {check}") from None
    _warn_if_readable_on_the_wire(endpoint)
    return client


def transfers(client: S3Client) -> TransferManager:
    """Return a manager of transfers in parts, for a `with` block."""
    from boto3.s3.transfer import create_transfer_manager

    return create_transfer_manager(client, _transfer_settings())


def download(client: S3Client, bucket: str, key: str, path: Path) -> None:
    """Download an object to a path, in parts."""
    # Not download_file: its own temporary file would be left behind by a SIGKILL under a random name.
    with path.open("wb") as target:
        client.download_fileobj(bucket, key, target, Config=_transfer_settings())


def keys_of(client: S3Client) -> object:
    """Return what tells the client's credentials from others; those that botocore refreshes equal no others."""
    found = client._get_credentials()  # type: ignore[attr-defined]  # botocore offers no public way
    return (found.access_key, found.secret_key, found.token) if type(found).__name__ == "Credentials" else found


def _transfer_settings() -> TransferConfig:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=_PART_BYTES,
        multipart_chunksize=_PART_BYTES,
        max_concurrency=_TRANSFER_THREADS,
        preferred_transfer_client="classic",  # the other one ignores endpoint_url and talks to AWS
    )


@functools.cache
def _warn_if_readable_on_the_wire(endpoint: str) -> None:
    """Warn, once per endpoint and process, of a connection that is not encrypted."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost" or host.endswith(".localhost")
    if parts.scheme == "http" and not loopback:
        _log.warning("%s is not encrypted: others on the network can read and change checkpoints. Use https.", endpoint)


_DENIED = {
    "AccessDenied": "this identity may not do that; ask for read, write, list and delete on the prefix",
    "AllAccessDisabled": "the bucket is disabled",
    "AccountProblem": "the account is not in order",
    "ExpiredToken": "the session token has expired; fetch a new one",
    "ExpiredTokenException": "the session token has expired; fetch a new one",
    "RequestExpired": "the request or its token has expired; fetch a new token, and check this machine's clock",
    "TokenRefreshRequired": "the session token has expired; fetch a new one",
    "InvalidToken": "the session token is not valid; is AWS_SESSION_TOKEN left over from other credentials?",
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID and the endpoint",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "400": "refused without a reason, as an expired token is; check the credentials and the region",  # only of a HEAD
    "403": "denied without a reason; check the credentials and the permission to list the bucket",
    "401": "denied without a reason; check the credentials",
}
_NO_CREDENTIALS = {
    "NoCredentialsError": "no credentials found",
    "PartialCredentialsError": "the credentials are incomplete",
    "CredentialRetrievalError": "the configured source gave no credentials",
    "TokenRetrievalError": "the sign-in has expired or failed; sign in again",
    "NoAuthTokenError": "not signed in",
    "SSOError": "the single sign-on has expired or failed; sign in again",
    "LoginError": "the sign-in has expired or failed; sign in again",
    "MetadataRetrievalError": "the instance's credential service did not answer",
    "ProfileNotFound": "AWS_PROFILE names a profile that is not in the configuration files",
}
_UNAVAILABLE = {
    "HTTPClientError",  # timeouts, refused and closed connections, bodies cut short, TLS
    "IncompleteReadError",
    "RetriesExceededError",  # s3transfer's and boto3's, around one of the others
    "FlexibleChecksumError",
    "HTTPError",  # urllib3's own
    "ConnectionError",
    "TimeoutError",
}
_REPEATED = {"BadDigest", "XAmzContentSHA256Mismatch", "ConditionalRequestConflict", "OperationAborted", "409"}
_REPEATED_CLASSES = {"IncompleteReadError", "ResponseStreamingError", "FlexibleChecksumError"}
_CHECKSUMS_UNKNOWN = {"NotImplemented", "XAmzContentSHA256Mismatch", "MissingContentLength", "501", "411"}
"""Words of servers that do not know the checksums sent with a request, or the framing in which they come."""
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "507"}


def code_and_status(error: BaseException) -> tuple[str, int]:
    """Return S3's error code and HTTP status, or ('', 0) for anything that is no answer of a server."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    return code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or (code if code.isdigit() else 0))


def retries_made(error: BaseException) -> int:
    """Return the number of times that botocore had already sent this request: earlier answers may be lost."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def is_worth_repeating(error: BaseException) -> bool:
    """Return True for what botocore does not retry itself: damaged in flight, cut while read, lost to a rival."""
    code, status = code_and_status(error)
    return code in _REPEATED or status == 409 or not _names(error).isdisjoint(_REPEATED_CLASSES)


def storage_error(
    error: BaseException, *, uri: str, endpoint: str, bucket_is_missing: bool = False
) -> StorageError | None:
    """Return the project's error, or None if the error is neither botocore's nor the network's."""
    where = f"{uri} (endpoint {endpoint})"
    names = _names(error)
    if reason := next((reason for name, reason in _NO_CREDENTIALS.items() if name in names), None):
        return AccessDeniedError(
            f"Access to {where} is denied: {reason}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or another standard AWS credential source, then run again."
        )
    if "ClientError" not in names and not names.isdisjoint(_UNAVAILABLE):
        return StoreUnavailableError(
            f"{where} did not answer properly ({type(error).__name__}), after all retries. Nothing is half written. "
            "Check the endpoint (AWS_ENDPOINT_URL_S3) and the network, then run again: finished uploads are reused."
        )
    if "ClientError" not in names:
        cannot = StorageError(f"{where} cannot be used: {error}. Check the AWS settings of this environment.")
        return None if names.isdisjoint({"BotoCoreError", "Boto3Error"}) else cannot

    code, status = code_and_status(error)
    if bucket_is_missing or code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").partition("/")[0]
        return BucketNotFoundError(
            f"Bucket {bucket!r} does not exist, asked for {where}. Create it, or correct the store's URI or endpoint."
        )
    if code in ("NoSuchKey", "NoSuchUpload", "NotFound", "404") or status == 404:
        return ObjectNotFoundError(f"{where} does not exist. List the store to see what does.")
    if code == "PreconditionFailed" or status == 412:
        return PreconditionFailedError(f"{where} was written by another writer first: read it and use what it holds.")
    if code in _DENIED or status in (401, 403):
        reason = _DENIED.get(code, "see the code")
        return AccessDeniedError(f"Access to {where} is denied, {code}: {reason}.")
    if code in _FULL or status == 507:
        return DiskFullError(
            f"The server of {where} has no space left ({code}). Free some space there, then run again."
        )
    message = getattr(error, "response", {}).get("Error", {}).get("Message", "")
    if code in _CHECKSUMS_UNKNOWN or (status == 400 and re.search(r"checksum|trailer|aws-chunked", message, re.I)):
        return StorageError(
            f"{where} refused the request, {code}: {message}. Servers that do not know S3's checksums say so. "
            f"{CHECKSUM_ADVICE}"
        )
    if code in _REPEATED or status == 409:
        return StoreUnavailableError(
            f"{where} refused several attempts ({code}): bytes were damaged on the way, or others keep writing the "
            "same object. Check the network and other running writers, then run again."
        )
    if status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout", "Throttling", "InternalError"):
        return StoreUnavailableError(
            f"{where} is unavailable ({code or status}), after all retries. Nothing is half written. "
            "Run again later: finished uploads are reused."
        )
    return StorageError(f"{where} refused the request, {code}: {message}. Check bucket, region and endpoint.")


def _names(error: BaseException) -> set[str]:
    return {base.__name__ for base in type(error).__mro__}
