"""Processes of the relora command: flows that fail, and Prefect servers it must not leave behind."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect_server import server_errors

FLOWS = """
import time
from prefect import flow, task
from prefect.states import Completed
from relora_train.errors import StoreUnavailableError
from tasks.alone import call_flow, has_server
from tasks.artifacts import publish_markdown
from tasks.observe import done, provenance, run_logger
from tasks.policies import STORE_IO

@task(**{**STORE_IO, "retries": 1, "retry_delay_seconds": 0})
def fragile():
    raise StoreUnavailableError("It is away. Wait.")

@flow
def failing():
    fragile()

@flow
def inner(number: int):
    return number + 1

@task
def state():
    return Completed(name="Skipped", data=[has_server(), provenance()])

@flow
def nested(number: int = "3"):
    run_logger().info("a flow has no logger of its own without a server")
    publish_markdown("key", "text", "what")
    return [*done(state()), call_flow(inner, {"number": number})]

@task
def long_work():
    print("working", flush=True)
    time.sleep(600)

@flow
def sleepy():
    long_work()
"""


DRIVER = """
import logging, sys
from relora_train import events
from relora_train.errors import ReLoRAError
from relora_train.cli.local_flow import TerminatedError, run_flow
from relora_train.reports.event_text import event_line

class Notices(logging.Handler):
    def emit(self, record):
        print("notice:", event_line(record.event))

events.listen(Notices())
try:
    print("result:", run_flow(sys.argv[1], {}, with_pages=print if "--pages" in sys.argv else None))
except (ReLoRAError, KeyboardInterrupt, TerminatedError) as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def flows_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which two flows are installed, with a Prefect home of its own."""
    root = tmp_path_factory.mktemp("flows")
    (root / "flows_for_tests.py").write_text(FLOWS)
    info = root / "flows_for_tests-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flows-for-tests\nVersion: 1\n")
    entries = "".join(f"{name} = flows_for_tests:{name}\n" for name in ("failing", "nested", "sleepy"))
    (info / "entry_points.txt").write_text(f"[relora_train.flows]\n{entries}")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PYTHONPATH": str(root), "PREFECT_HOME": str(root / "prefect"), "COLUMNS": "100"}


@contextmanager
def driver(flow: str, environment: dict[str, str], *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", DRIVER, flow, *options]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def servers_of(owner: int) -> list[str]:
    """Lines 'pid command' of the Prefect servers that a process started and that still run."""
    listed = subprocess.run(
        ["ps", "-ewwo", "pid=,args="], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [text for text in listed if "relora_train.cli.local_server" in text and text.endswith(f" {owner}")]


def wait_until_gone(owner: int, *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while servers_of(owner):
        assert time.monotonic() < deadline, servers_of(owner)
        time.sleep(0.2)


def test_a_failed_task_is_its_own_error_without_a_traceback(flows_environment: dict[str, str]) -> None:
    with driver("failing", flows_environment) as process:
        out, err = process.communicate(timeout=240)
        retried = "notice: fragile failed: It is away. Retry 1 of 1 immediately."
        assert out.splitlines() == [retried, "StoreUnavailableError It is away. Wait."]
        assert err == ""


def test_without_a_server_flows_of_flows_and_states_give_their_results_and_nothing_is_recorded(
    flows_environment: dict[str, str], tmp_path: Path
) -> None:
    with driver("nested", {**flows_environment, "PREFECT_HOME": str(tmp_path)}) as process:
        out, err = process.communicate(timeout=240)
    assert (out, err) == ("result: [False, {}, 4]\n", "")
    assert not list(tmp_path.rglob("*.db"))


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGTERM, "TerminatedError SIGTERM"), (signal.SIGINT, "KeyboardInterrupt")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_run_without_a_server_is_stopped_in_order(flows_environment: dict[str, str], number: int, said: str) -> None:
    with driver("sleepy", flows_environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        assert servers_of(process.pid) == []
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (out.strip(), err) == (said, "")


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGTERM, "TerminatedError SIGTERM"), (signal.SIGINT, "KeyboardInterrupt "), (signal.SIGKILL, "")],
    ids=["SIGTERM", "Ctrl-C", "SIGKILL"],
)
def test_the_prefect_server_ends_with_the_run(flows_environment: dict[str, str], number: int, said: str) -> None:
    with driver("sleepy", flows_environment, "--pages") as process:
        assert process.stdout is not None
        with urllib.request.urlopen(process.stdout.readline().strip(), timeout=60) as page:
            assert b"<title>Prefect" in page.read()
        assert process.stdout.readline() == "working\n"
        [server] = servers_of(process.pid)
        assert server_errors(Path(f"/proc/{server.split()[0]}/fd/1")) == []  # a file without a name
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        out, err = process.communicate(timeout=30)  # a server left behind would hold both pipes open
        assert (out.strip(), err) == (said.strip(), "")
        wait_until_gone(process.pid)


def test_a_prefect_server_that_is_killed_is_started_again(flows_environment: dict[str, str]) -> None:
    """Prefect's client would try for minutes to reach it, and could not be stopped meanwhile."""
    with driver("sleepy", flows_environment, "--pages") as process:
        assert process.stdout is not None and process.stdout.readline().startswith("http://127.0.0.1:")
        assert process.stdout.readline() == "working\n"
        [first] = servers_of(process.pid)
        os.kill(int(first.split()[0]), signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not (servers := [server for server in servers_of(process.pid) if server != first]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert "TerminatedError SIGTERM" in out, (out, err, servers)
        wait_until_gone(process.pid)


def test_a_prefect_server_of_the_users_that_does_not_answer_is_named(flows_environment: dict[str, str]) -> None:
    with driver("failing", {**flows_environment, "PREFECT_API_URL": "http://127.0.0.1:9/api"}) as process:
        out, err = process.communicate(timeout=60)
        assert out.startswith("ConfigError No Prefect server answers at http://127.0.0.1:9/api") and err == ""
