"""Clients of S3, as the standard AWS environment and configuration files describe them. Only this file imports boto3.

Request checksums stay at botocore's default (`when_supported`): without them a flipped bit is stored silently.
A call tries at most RELORA_S3_MAX_ATTEMPTS times (default 8): about a minute when connections are refused.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from relora_train.errors import ConfigError
from relora_train.storage.redaction import holds_secrets, without_secrets
from relora_train.storage.s3_errors import storage_error

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
