"""A real Prefect server for tests that run flows: for the flows of this process, or as an operator starts one.

However a test starts a server, `no_server_errors` reads its logs at the end: an ERROR in one fails the test.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
}

PREFECT_WARNS = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "ResourceWarning", "pytest.PytestUnraisableExceptionWarning", "UserWarning")
]
"""Prefect and what it depends on warn of their own internals; none of it is ours to mend."""

_ERROR = re.compile(r"^(?:[\d:.]+ \| )?(?:ERROR|CRITICAL)\b.*?(?=^[\d:.]+ \| |^[A-Z]+: |\Z)", re.MULTILINE | re.DOTALL)
"""A record with its traceback. Prefect begins one with a time, uvicorn with the level."""


def server_errors(log: Path) -> list[str]:
    """What a Prefect server logged as an error, but for SQLite's collisions, and a client that logs in twice.

    The server's own end in the middle of a flush is excused too: it keeps those records for the next attempt.

    A transaction that has read before another one wrote may not write any more; on a busy machine Prefect meets that
    now and then, and does the same again later. PostgreSQL knows no such thing. A client logs in again where the
    connection was cut in the middle of it; the server takes that for an event.
    """
    records = _ERROR.findall(log.read_text(errors="replace"))
    known = (
        "(sqlite3.OperationalError) database is locked",
        "input_value={'type': 'auth'",
        "CancelledError: Cancelled via",
    )
    return [record for record in records if not any(words in record for words in known)]


@contextmanager
def no_server_errors(directory: Path) -> Iterator[None]:
    """Fail after the block, which must end the servers that write server*.log there, if an error is in a log.

    A server with a broken part answers every request: only its log says, say, that no schedule will ever fire.
    """
    yield
    logs = list(directory.glob("server*.log"))
    assert logs, f"no server wrote a log into {directory}"
    for log in logs:
        errors = server_errors(log)
        assert not errors, f"{len(errors)} errors of Prefect's server in {log}:\n{''.join(errors)[:5000]}"


@contextmanager
def output_into(log: Path) -> Iterator[None]:
    """Let processes that the block starts write into a file, when nobody asks how their output should go."""
    kept = [os.dup(number) for number in (1, 2)]
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


@contextmanager
def running_prefect(home: Path) -> Iterator[None]:
    """Flows called in this process talk to a server that ends with the block."""
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**QUIET, "PREFECT_HOME": str(home)}.items():
            patch.setenv(name, value)
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
        from prefect.testing.utilities import prefect_test_harness

        home.mkdir(parents=True, exist_ok=True)
        with no_server_errors(home), ExitStack() as stack:
            with output_into(home / "server.log"):
                stack.enter_context(prefect_test_harness(server_startup_timeout=180))
            # The heartbeat thread is joined at the end of every flow and costs a second each time.
            stack.enter_context(temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}))
            yield


@dataclass(frozen=True)
class ServedPrefect:
    """A server as an operator starts it, with its pages."""

    api_url: str
    home: Path

    def post(self, path: str, **body: Any) -> Any:
        """The JSON answer of the API to a request; filters take their bodies by POST."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.api_url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def all_of(self, path: str, **body: Any) -> list[Any]:
        """Every page of a filter's answer."""
        found: list[Any] = []
        while page := self.post(path, **body, limit=200, offset=len(found)):
            found += page
        return found


@contextmanager
def serving_prefect(home: Path) -> Iterator[ServedPrefect]:
    """`prefect server start` as a process, until the block ends. This process's settings stay as they are."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**ours, **QUIET, "PREFECT_HOME": str(home), "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api"}
    server = ServedPrefect(f"http://127.0.0.1:{port}/api", home)
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    with no_server_errors(home):
        try:
            _wait_until_healthy(server, process)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(server: ServedPrefect, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.api_url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"prefect server did not start:\n{(server.home / 'server.log').read_text()[-3000:]}")
