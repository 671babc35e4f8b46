"""What an operator has: a long-lived Prefect server, a work pool, the shipped deployments, workers that can be killed.

Everything goes through the commands that the README prints, as separate processes, and through Prefect's HTTP API.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prefect_server import QUIET, no_server_errors

ROOT = Path(__file__).resolve().parent.parent
POOL = "test-pool"
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

AS_DOCUMENTED = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_CLIENT_MAX_RETRIES": "9",
}
"""What deploy/README.md has an operator set, and deploy/Dockerfile sets, for server and worker."""

T = TypeVar("T")


@dataclass
class Operator:
    """Commands and questions to one Prefect server."""

    api_url: str
    environment: dict[str, str]
    directory: Path
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    server: subprocess.Popen[bytes] = field(init=False)

    def start_server(self) -> None:
        """On the database, the files and the port that it had before; returns when it answers."""
        port = str(urlsplit(self.api_url).port)
        command = self.command("prefect", "server", "start", "--host", "127.0.0.1", "--port", port)
        self.server = self.start("server", command)
        wait_for(lambda: answers(self), 180, self.last_words)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", *arguments]

    def prefect(self, *arguments: str, expect: int = 0) -> str:
        """The output of a `prefect` command, which must end with this status."""
        return self.output("prefect", *arguments, expect=expect)

    def output(self, *arguments: str, expect: int = 0) -> str:
        """The output of a module as a command, which must end with this status."""
        done = subprocess.run(
            self.command(*arguments), env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == expect, (arguments, done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def deploy(self, *names: str) -> None:
        self.prefect("work-pool", "create", "--type", "process", POOL)
        chosen = [part for name in names for part in ("-n", name)]
        self.prefect("--no-prompt", "deploy", *chosen, "--prefect-file", "deploy/prefect.yaml")

    def start_worker(self) -> subprocess.Popen[bytes]:
        """In a session of its own, started from outside the checkout."""
        return self.start("worker", self.command("prefect", "worker", "start", "--pool", POOL))

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}-{len(self.workers)}.log").open("wb") as log:
            worker = subprocess.Popen(
                command, env=self.environment, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.workers.append(worker)
        return worker

    def run(self, deployment: str, **parameters: Any) -> str:
        """Ask for a run as a person would; the flow run's id."""
        given = [part for key, value in parameters.items() for part in ("-p", f"{key}={json.dumps(value)}")]
        output = self.prefect("deployment", "run", deployment, *given)
        found = re.search(r"UUID: ([0-9a-f-]{36})", output)
        assert found, output
        return found[1]

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api("GET", f"/flow_runs/{flow_run_id}")
        return found

    def state(self, flow_run_id: str) -> str:
        return str(self.flow_run(flow_run_id)["state_type"])

    def wait_for_state(self, flow_run_id: str, *states: str, seconds: float) -> str:
        """The state once it is one of these; any other final state fails at once."""

        def reached() -> str | None:
            state = self.state(flow_run_id)
            assert state in states or state not in FINAL, (state, self.logs(flow_run_id), self.last_words())
            return state if state in states else None

        return wait_for(reached, seconds, lambda: (self.flow_run(flow_run_id)["state"], self.last_words()))

    def logs(self, flow_run_id: str) -> list[str]:
        asked = {"logs": {"flow_run_id": {"any_": [flow_run_id]}}, "sort": "TIMESTAMP_ASC"}
        return [record["message"] for record in self.api("POST", "/logs/filter", asked)]

    def api(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.api_url}{path}", data=data, headers=headers, method=method)
        for seconds in (1, 2, 4, 8, 16, None):  # Prefect's own client asks a busy server again, too
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    return json.loads(response.read() or b"null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or seconds is None:
                    raise
                time.sleep(seconds)
        return None

    def last_words(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.directory.glob("*.log")))


@contextmanager
def running_operator(directory: Path, **environment: str) -> Iterator[Operator]:
    """A server on a database of its own; it and every worker left are gone after the block."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    operator = Operator(
        api_url=f"http://127.0.0.1:{port}/api",
        directory=directory,
        environment={
            **os.environ,
            **QUIET,
            "PREFECT_LOGGING_LEVEL": "INFO",
            "PREFECT_HOME": str(directory / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            **AS_DOCUMENTED,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RELORA_WORK_POOL": POOL,
            "RELORA_CACHE": str(directory / "cache"),
            **environment,
        },
    )
    with no_server_errors(directory):
        try:
            operator.start_server()
            yield operator
        finally:
            for worker in reversed(operator.workers):
                stop(worker, signal.SIGKILL if worker is not operator.server else signal.SIGTERM)


def install_automations(operator: Operator, *files: str, **environment: str) -> None:
    """Follow the runbook; `python` and `prefect` are found on PATH, as in an activated environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(ROOT / "deploy" / "automations.sh"), *files]
    environment = {**operator.environment, "PATH": path, **environment}
    subprocess.run(command, env=environment, check=True, timeout=180)


@contextmanager
def receiver_of_alarms(operator: Operator) -> Iterator[list[dict[str, str]]]:
    """Messages that the server's block custom-webhook/alarms has sent so far: subject and body of each."""
    told: list[dict[str, str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        program = f"""
from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block
told = {{"subject": "{{{{subject}}}}", "body": "{{{{body}}}}"}}
Block(name="alarms", url="http://127.0.0.1:{server.server_port}/", json_data=told).save("alarms", overwrite=True)
"""
        subprocess.run([sys.executable, "-c", program], env=operator.environment, check=True, timeout=180)
        Thread(target=server.serve_forever, daemon=True).start()
        yield told
        server.shutdown()


def answers(operator: Operator) -> bool:
    try:
        return bool(operator.api("GET", "/health"))
    except (OSError, urllib.error.URLError):
        return False


def stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def wait_for(question: Callable[[], T | None], seconds: float, explain: Callable[[], Any]) -> T:
    """The first answer that is true, asked for twice a second."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < deadline, explain()
        time.sleep(0.5)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """Pids of a process's descendants, nearest first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children_of(child)]
    return found
