"""A worker process as its parent sees it: what it says, how it is stopped, and the error that its end stands for."""

import contextlib
import contextvars
import logging
import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator

from relora_train import events
from relora_train.errors import ReLoRAError, TrainerCrashedError, TrainerFaultError, error_named
from relora_train.events import Event
from relora_train.process import PARENT_PIPE_VARIABLE, SAFE_PATH, SERVED, STOP_SECONDS, TAKEN
from relora_train.storage.workspace import cache_root

_TAIL_LINES = 20
_SECRETS = ("AWS_", "WANDB_API_KEY", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")
_LOGGER = logging.getLogger(__name__)


class WorkerProcess:
    """A process in a session of its own, with a pipe either way.

    A thread reads what it says: whatever interrupts the listener, the pipe never fills up.
    """

    def __init__(
        self, module: str, command: list[str], *, keep_secrets: bool = False, keep: Collection[str] = ()
    ) -> None:
        """keep: names of variables with secrets that the process gets nevertheless."""
        self._module = module
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if keep_secrets or name in keep or not name.startswith(_SECRETS)
            },
            **SAFE_PATH,
            PARENT_PIPE_VARIABLE: "1",
            # libgomp's threads spin a millisecond at every barrier: beside any other work that costs a factor of six.
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
            # Compiled code of one stage or run is there for the next.
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "compiled")),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",  # a warning about forks otherwise; workers are processes of their own
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self._process = subprocess.Popen(  # noqa: S603 (our own module and interpreter)
            command,
            stdin=subprocess.PIPE,  # open as long as we live: its end tells an orphan to stop
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in the terminal reaches us alone, and we stop the worker in order
        )
        self.took_request = False
        self._failures: list[Event] = []
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._heard: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        run = contextvars.copy_context().run  # what is logged there belongs to the run around us
        self._reader = threading.Thread(target=run, args=(self._read,), name="worker-output", daemon=True)
        self._reader.start()

    @property
    def ended_well(self) -> bool:
        return self._process.returncode == 0 and not self._failures

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def listen(self, on_event: Callable[[Event], None], *, line: str | None = None) -> bool:
        """Pass events on until the worker ends, or until it has served the request that `line` names: then True.

        A listener that raises ends the worker, in order.
        """
        self.took_request = False
        self._failures.clear()
        try:
            if line is not None:
                self._tail.clear()
                self.send(line)
            for event in self._events():
                if event["event"] == "failed":
                    self._failures.append(event)
                elif line is not None and event["event"] == TAKEN:
                    self.took_request = True
                elif line is not None and event["event"] == SERVED:
                    return True
                else:
                    on_event(event)
            self._process.wait()
        except BaseException:
            try:
                self._stop(on_event)
            finally:  # also when a second Ctrl-C comes
                self.close()
            raise
        self.close()
        return False

    def send(self, line: str) -> None:
        """Write a line to the worker's input; one that has just died does not read it, and its status will say why."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(f"{line}\n")
                self._process.stdin.flush()

    def _events(self, *, until: float = math.inf) -> Iterator[Event]:
        """Yield events to the end of the worker's output, or until that time of the monotonic clock."""
        with contextlib.suppress(queue.Empty):
            while event := self._heard.get(timeout=None if math.isinf(until) else max(0.0, until - time.monotonic())):
                yield event

    def _read(self) -> None:
        try:
            for line in self._process.stdout or ():
                event = events.decode(line)
                if event is not None and event["event"] == "warning":
                    _LOGGER.warning("%s", event["message"])
                elif event is not None:
                    self._heard.put(event)
                elif line.strip():
                    self._tail.append(line.rstrip())
                    _LOGGER.debug("%s", line.rstrip())
        finally:
            self._heard.put(None)

    def _stop(self, on_event: Callable[[Event], None]) -> None:
        """Ask a worker and its ranks to end, and hear what it still has to say, for as long as that may take."""

        def tell(event: Event) -> None:
            try:
                on_event(event)
            except Exception:  # a listener that fails now must not keep the worker from being stopped
                _LOGGER.debug("A listener failed on %s", event["event"], exc_info=True)

        deadline = time.monotonic() + STOP_SECONDS
        tell({"event": "stopping", "seconds": STOP_SECONDS})
        self._process.terminate()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        for event in self._events(until=deadline):
            if event["event"] != "failed":  # it says that it was stopped
                tell(event)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=max(0.0, deadline - time.monotonic()))

    def close(self, *, seconds: float = 0.0) -> None:
        """End the worker's input, kill its whole session if it lives so many seconds longer, and close its output.

        A descendant that outlived it may hold the output open, and is not waited for.
        """
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)
        if self.is_alive:
            self.kill()
            self._process.wait()
        self._reader.join(timeout=1.0)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()

    def kill(self) -> None:
        """Kill the worker's whole session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def error(self) -> ReLoRAError:
        """Return the error that the worker's end stands for: its own, else TrainerCrashedError."""
        status, tail = self._process.returncode, self._tail
        last_lines = "\n".join(f"    {line}" for line in tail)
        if self._failures:
            heard = [error_named(str(failure["error"]), str(failure["message"])) for failure in self._failures]
            # One rank's error makes the others lose it, and they may be heard first.
            error = next((each for each in heard if not isinstance(each, TrainerCrashedError)), heard[0])
            if isinstance(error, TrainerCrashedError | TrainerFaultError) and tail:
                return type(error)(f"{error}\n  Last output:\n{last_lines}")
            return error
        if status < 0:
            name = signal.Signals(-status).name
            out_of_memory = " The system's out-of-memory killer does this: see batch.micro_sequences."
            what = f"was killed by {name}.{out_of_memory if name == 'SIGKILL' else ''}"
        else:
            what = f"ended with status {status}."
        shown = f"\n  Last output:\n{last_lines}" if tail else ""
        return TrainerCrashedError(
            f"The process {self._module} {what} Nothing of its stage was committed; the same command runs it again."
            f"{shown}"
        )
