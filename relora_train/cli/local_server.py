"""A Prefect server of one's own, for as long as this process lives: nothing to set up before and nothing to stop after.

Prefect can start one by itself, but that one shares our terminal and outlives us: Ctrl-C kills it before the run can be
recorded as stopped, and SIGKILL leaves it behind for ever. Ours is in a session of its own and watches its parent.
This module is both sides: what starts the server, and with `python -m` the server's process.
"""

import atexit
import http
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

from relora_train.errors import ConfigError, OrchestratorError, ReLoRAError
from relora_train.process import NO_SERVER, SAFE_PATH
from relora_train.storage.redaction import without_secrets

API_URL = "PREFECT_API_URL"
_HOST = "127.0.0.1"
_SERVER_SETTINGS = {
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",  # outlive a kill
}
_TIMEOUT_VARIABLE = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
_STOP_SECONDS = 10.0
_WATCH_SECONDS = 1.0


class LocalServer:
    """A server on a free port of this machine, which may not answer yet; it ends with this process, however that ends.

    One that is killed is started again, on the same records. It stops last of all at exit, so that what Prefect still
    wants to record then arrives: to be made before Prefect is imported.
    """

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            port = probe.getsockname()[1]
        self.api_url = f"http://{_HOST}:{port}/api"
        self._command = [sys.executable, "-m", "relora_train.cli.local_server", str(port), str(os.getpid())]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the server)
        self._ending = threading.Event()
        self._start()
        threading.Thread(target=self._keep_alive, daemon=True).start()
        atexit.register(self.stop)

    def _start(self) -> None:
        self.process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 (our own module and interpreter)
            self._command,
            env={**os.environ, **SAFE_PATH, **_SERVER_SETTINGS, "PREFECT_UI_API_URL": self.api_url},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _keep_alive(self) -> None:
        """Without a server Prefect's client tries for minutes, and cannot even be stopped meanwhile."""
        for _ in range(5):
            while self.process.poll() is None:
                if self._ending.wait(_WATCH_SECONDS):
                    return
            if self.process.returncode >= 0 or self._ending.is_set():
                return  # it left by itself: it would again
            self._start()

    def wait_until_ready(self) -> None:
        """Return when it answers. Raises ReLoRAError with its last words if it ends or takes too long."""
        seconds = float(os.environ.get(_TIMEOUT_VARIABLE, "120"))
        deadline = time.monotonic() + seconds
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            with suppress(OSError), opener.open(f"{self.api_url}/health", timeout=5):
                return
            if self.process.poll() is not None:
                raise ReLoRAError(f"Prefect's server ended with status {self.process.returncode}.{self._last_words()}")
            if time.monotonic() > deadline:
                raise ReLoRAError(
                    f"Prefect's server did not answer within {seconds:.0f} s. Run again when the machine is less busy, "
                    f"or set {_TIMEOUT_VARIABLE} higher.{self._last_words()}"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """End it in order, or by force after ten seconds. Safe to repeat."""
        self._ending.set()
        self.process.terminate()
        try:
            self.process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _last_words(self) -> str:
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - 2000))
        lines = self._output.read().decode(errors="replace").strip().splitlines()[-10:]
        return "".join(f"\n    {line}" for line in lines)


def users_server() -> str | None:
    """Return the address of the Prefect server that the user named."""
    named = os.environ.get(API_URL)
    return None if named == NO_SERVER else named


def check_server(api_url: str) -> None:
    """Return when a Prefect server answers there that is well.

    Raises ConfigError for an address where none answers, and OrchestratorError for one that answers with an error.
    """
    shown = without_secrets(api_url)  # Prefect logs in with a user name and a password from there; we only knock
    try:
        with urllib.request.urlopen(f"{shown}/health", timeout=10):  # noqa: S310 (the user's own setting)
            return
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.NOT_FOUND:
            raise ConfigError(
                f"{shown}, which PREFECT_API_URL names, is no Prefect API: it has no /health. Such an address ends "
                "with /api."
            ) from None
        raise OrchestratorError(
            f"The Prefect server at {shown} answers {error.code} {error.reason}. Look into its log; then start again."
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"No Prefect server answers at {shown}, which PREFECT_API_URL names: {reason}. Start it, correct the "
            "variable, or unset it: then the run does without."
        ) from None


def _serve(port: int, owner: int) -> None:
    def leave_with_owner() -> None:
        while os.getppid() == owner:
            time.sleep(_WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_STOP_SECONDS)
        os._exit(1)

    threading.Thread(target=leave_with_owner, daemon=True).start()
    import uvicorn

    # Not its command, which imports from the current directory first.
    app = "prefect.server.api.server:create_app"
    uvicorn.run(app, factory=True, host=_HOST, port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
