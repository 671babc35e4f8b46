"""Start a worker process, stream its events, map its end to an error. Light: imports no torch, boto3 or prefect."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from relora_train import events
from relora_train.errors import ReLoRAError, TrainerCrashedError, TrainerFaultError, error_named
from relora_train.events import Event
from relora_train.process import PARENT_PIPE_VARIABLE, SAFE_PATH, STOP_SECONDS
from relora_train.settings.base import FrozenConfig
from relora_train.settings.running import LaunchConfig

_LOGGER = logging.getLogger(__name__)

WORKER = "relora_train.worker"
"""The module as which every worker process starts, before that of its work."""

_TAIL_LINES = 20
_SECRETS = ("AWS_", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")


@dataclass(frozen=True)
class Nodes:
    """This machine among those that run one worker together, in the words of torchrun."""

    nnodes: int
    rdzv_endpoint: str
    node_rank: int = 0
    """0 is the machine of the flow: its first rank writes files and events."""

    wait_seconds: int = 600
    """How long this machine waits for the others."""


def nodes_of(launch: LaunchConfig) -> Nodes | None:
    """The machines that a profile asks for, seen from the flow's; None for one."""
    if launch.nnodes == 1 or launch.rdzv_endpoint is None:
        return None
    return Nodes(launch.nnodes, launch.rdzv_endpoint)


def run_worker(
    module: str,
    request: FrozenConfig,
    request_path: Path,
    *,
    on_event: Callable[[Event], None],
    nproc_per_node: int | Literal["gpu"] = 1,
    nodes: Nodes | None = None,
    keep_secrets: bool = False,
) -> None:
    """Run `python -m module --request request_path` to its end, under torch's elastic launcher for several ranks.

    Every event of the worker goes to on_event, every other line of its output to this module's logger. The worker sees
    no credentials unless keep_secrets. Whatever ends this call early (an exception, Ctrl-C, a cancelled run) ends the
    worker first: SIGTERM, and SIGKILL after 25 s. What the worker says meanwhile still goes to on_event, after the
    event `stopping`.

    Raises the error the worker reported, else TrainerCrashedError with its exit status and last lines.
    """
    request_path.parent.mkdir(parents=True, exist_ok=True)
    request_path.write_text(request.model_dump_json())
    process = start_worker(_command(module, request_path, nproc_per_node, nodes), keep_secrets=keep_secrets)
    output = WorkerOutput(process)
    failures: list[Event] = []
    try:
        for event in output.events():
            if event["event"] == "failed":
                failures.append(event)
            else:
                on_event(event)
        status = process.wait()
    except BaseException:
        stop_worker(process, output, on_event)
        raise
    finally:
        close_worker(process, output)
    tail = output.tail
    if failures or status != 0:
        raise worker_error(module, failures, status, tail)


def start_worker(command: list[str], *, keep_secrets: bool = False) -> subprocess.Popen[str]:
    """Start a worker in a session of its own, with a pipe either way."""
    return subprocess.Popen(  # noqa: S603 (our own module and interpreter)
        command,
        stdin=subprocess.PIPE,  # open as long as we live: its end tells an orphan to stop
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(keep_secrets=keep_secrets),
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C in the terminal reaches us alone, and we stop the worker in order
    )


def _command(module: str, request_path: Path, nproc_per_node: int | Literal["gpu"], nodes: Nodes | None) -> list[str]:
    worker = ["-m", WORKER, module, "--request", str(request_path)]
    if nproc_per_node == 1 and nodes is None:
        return [sys.executable, *worker]
    place = ["--standalone"]
    if nodes is not None:
        # Not the elastic backend: it would put the first rank, which speaks to the flow, on any of the machines.
        place = [
            "--rdzv-backend=static",
            f"--rdzv-endpoint={nodes.rdzv_endpoint}",
            f"--rdzv-conf=timeout={nodes.wait_seconds}",
            f"--nnodes={nodes.nnodes}",
            f"--node-rank={nodes.node_rank}",
        ]
    log_dir = request_path.parent / "torchrun"  # else each launch leaves a directory in the system's temporary one
    ranks = [f"--nproc-per-node={nproc_per_node}", f"--log-dir={log_dir}"]
    return [sys.executable, "-m", WORKER, "relora_train.runs.agent", *place, *ranks, *worker]


def _environment(*, keep_secrets: bool) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if keep_secrets or not k.startswith(_SECRETS)}
    return {
        **kept,
        **SAFE_PATH,
        PARENT_PIPE_VARIABLE: "1",
        # libgomp's threads spin for a millisecond at every barrier: beside any other work that costs a factor of six.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",  # a warning about forks otherwise; workers are processes of their own
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


class WorkerOutput:
    """What a worker says, read by a thread of its own: whatever interrupts the listener, the pipe never fills up."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._stream: IO[str] | None = process.stdout
        self._heard: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        run = contextvars.copy_context().run  # what is logged there belongs to the run around us
        self.reader = threading.Thread(target=run, args=(self._read,), name="worker-output", daemon=True)
        self.reader.start()

    def events(self, *, until: float = math.inf) -> Iterator[Event]:
        """Events to the end of the worker's output, or until that time of the monotonic clock."""
        while True:
            left = until - time.monotonic()
            try:
                event = self._heard.get(timeout=None if math.isinf(left) else max(0.0, left))
            except queue.Empty:
                return
            if event is None:
                return
            yield event

    def _read(self) -> None:
        try:
            for line in self._stream or ():
                event = events.decode(line)
                if event is not None and event["event"] == "warning":
                    _LOGGER.warning("%s", event["message"])
                elif event is not None:
                    self._heard.put(event)
                elif line.strip():
                    self.tail.append(line.rstrip())
                    _LOGGER.debug("%s", line.rstrip())
        finally:
            self._heard.put(None)


def stop_worker(process: subprocess.Popen[str], output: WorkerOutput, on_event: Callable[[Event], None]) -> None:
    """End a worker and its ranks: ask, hear what it still has to say, then kill its whole session."""
    deadline = time.monotonic() + STOP_SECONDS
    try:
        _tell(on_event, {"event": "stopping", "seconds": STOP_SECONDS})
        process.terminate()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for event in output.events(until=deadline):
            if event["event"] != "failed":  # it says that it was stopped
                _tell(on_event, event)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
    finally:  # also when a second Ctrl-C comes
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tell(on_event: Callable[[Event], None], event: Event) -> None:
    """A listener that fails now must not keep the worker from being stopped."""
    try:
        on_event(event)
    except Exception:
        _LOGGER.debug("A listener failed on %s", event["event"], exc_info=True)


def close_worker(process: subprocess.Popen[str], output: WorkerOutput) -> None:
    """Close both pipes of a worker that has ended.

    A descendant that outlived it may hold the output open, and is not waited for.
    """
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    output.reader.join(timeout=1.0)
    if process.stdout is not None and not output.reader.is_alive():
        process.stdout.close()


def worker_error(module: str, failures: list[Event], status: int, tail: deque[str]) -> ReLoRAError:
    """The error that a worker's end stands for: its own, else TrainerCrashedError."""
    last_lines = "\n".join(f"    {line}" for line in tail)
    if failures:
        heard = [error_named(str(failure["error"]), str(failure["message"])) for failure in failures]
        # One rank's error makes the others lose it, and they may be heard first.
        error = next((each for each in heard if not isinstance(each, TrainerCrashedError)), heard[0])
        if isinstance(error, TrainerCrashedError | TrainerFaultError) and tail:
            return type(error)(f"{error}\n  Last output:\n{last_lines}")
        return error
    if status < 0:
        name = signal.Signals(-status).name
        hint = " The system's out-of-memory killer does this: see batch.micro_sequences." if name == "SIGKILL" else ""
        what = f"was killed by {name}.{hint}"
    else:
        what = f"ended with status {status}."
    shown = f"\n  Last output:\n{last_lines}" if tail else ""
    return TrainerCrashedError(
        f"The process {module} {what} Nothing of its stage was committed; the same command runs it again.{shown}"
    )
