"""A Prefect server that is away or answers with an error: an error of the server, not of a setting and not ours."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect_server import no_server_errors, server_errors

from relora_train.errors import ConfigError, OrchestratorError
from tasks.deployed import require_deployment, run_deployed


@contextmanager
def server(answers: dict[str, int], otherwise: int) -> Iterator[str]:
    """An API whose paths that end so answer with these statuses."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status = next((status for end, status in answers.items() if self.path.endswith(end)), otherwise)
            body = json.dumps({"detail": "the database is away"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 (http.server's names)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/api"
        running.shutdown()


@contextmanager
def prefect_at(url: str) -> Iterator[None]:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield


@pytest.mark.parametrize("status", [401, 500, 503])
def test_an_answer_that_is_an_error_is_shown_with_its_request_and_its_words(status: int):
    with server({}, otherwise=status) as url, prefect_at(url):
        with pytest.raises(OrchestratorError, match=f"GET {url}/.*quickstart with {status} .*the database is away"):
            require_deployment("pretrain/quickstart")
        with pytest.raises(OrchestratorError, match=f"with {status} "):
            list(run_deployed("pretrain/quickstart", {"a": {}}))


def test_no_answer_is_an_error_of_the_server_and_no_such_deployment_one_of_a_setting():
    with prefect_at("http://127.0.0.1:9/api"), pytest.raises(OrchestratorError, match="does not answer"):
        require_deployment("pretrain/quickstart")
    with server({}, otherwise=404) as url, prefect_at(url):
        for name in ("pretrain/quickstart", "without-a-slash"):
            with pytest.raises(ConfigError, match=f"knows no deployment '{name}'"):
                require_deployment(name)


@pytest.mark.parametrize(
    ("answers", "otherwise", "code", "words"),
    [
        ({"/health": 503}, 200, 8, "/api answers 503 Service Unavailable"),
        ({}, 404, 2, "is no Prefect API"),
        ({"/health": 200}, 500, 8, "/api failed: Server error '500"),
    ],
    ids=["unwell", "another service", "fails later"],
)
def test_the_command_says_so_and_ends_with_the_code_of_its_kind(
    answers: dict[str, int], otherwise: int, code: int, words: str, tmp_path: Path
):
    with server(answers, otherwise) as url:
        environment = {
            **os.environ, "PREFECT_API_URL": url, "PREFECT_CLIENT_MAX_RETRIES": "0", "PREFECT_HOME": str(tmp_path),
            "RELORA_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        command = [sys.executable, "-m", "relora_train.cli.app", "run", "smoke", "--store", str(tmp_path / "store")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code and words in " ".join(done.stderr.split()), (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr


def test_an_error_in_a_servers_log_is_an_error_and_a_collision_in_sqlite_is_none(tmp_path: Path):
    collision = "07:00:00.1 | ERROR   | a - x\nTraceback\n(sqlite3.OperationalError) database is locked\n"
    error, warning = "07:00:01.2 | ERROR   | b - y\nTraceback\n", "07:00:02.3 | WARNING | c - no ERROR\n"
    of_uvicorn = "ERROR:    Exception in ASGI application\n"
    (tmp_path / "server-2.log").write_text(collision + warning)
    with no_server_errors(tmp_path):
        pass
    (tmp_path / "server-2.log").write_text(warning + error + collision + of_uvicorn + warning)
    assert server_errors(tmp_path / "server-2.log") == [error, of_uvicorn]
    with pytest.raises(AssertionError, match="2 errors"), no_server_errors(tmp_path):
        pass
