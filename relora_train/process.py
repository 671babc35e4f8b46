"""The worker's side of a process: read a request, report events, end with a documented status.

A worker is told to stop by SIGTERM or SIGINT, or by the end of its standard input when its parent died. One that serves
request after request reads from there which one is next.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self, TypeVar

from pydantic import BaseModel

from relora_train import events
from relora_train.errors import (
    DeviceError,
    DeviceMemoryError,
    DiskFullError,
    ReLoRAError,
    TrainerCrashedError,
    TrainerFaultError,
    may_pass,
)

PARENT_PIPE_VARIABLE = "RELORA_PARENT_PIPE"
"""Tells a worker that its standard input stays open as long as its parent lives."""

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Keeps the directory in which a process starts out of its imports, and out of those of the processes it starts."""

SERVE_OPTION = "--serve"
"""Starts a worker without a request; they come on its standard input."""

TAKEN, SERVED = "taken", "served"
"""The events with which such a worker begins a request, and ends one that went well."""

NO_MORE = "null"
"""Named in the place of a request, it ends a run's ranks on all machines."""

NO_SERVER = "none://"
"""The PREFECT_API_URL of a run without a Prefect server: whatever asks it fails at once, before it opens a socket."""

STOP_SECONDS = 25.0
"""Seconds that a worker may take to end after SIGTERM; Prefect kills the whole run after 30."""

_emitting = threading.Lock()
R = TypeVar("R", bound=BaseModel)

# The last one is NCCL's, of the driver.
_MEMORY_WORDS = (
    "CUDA error: out of memory", "ALLOC_FAILED", "DefaultCPUAllocator", "Cannot allocate memory", "'out of memory'",
)  # fmt: skip

SNAPSHOT_THREAD = "snapshot"
"""Name of the thread that writes one."""

SHARED_MEMORY = "/dev/shm"  # noqa: S108 (where NCCL and torch keep it; nothing of ours is there)


class Emit(Protocol):
    """Send one event to the parent."""

    def __call__(self, event: str, **fields: object) -> None: ...


def serve_request(kind: type[R], work: Callable[[R, Emit], None]) -> None:
    """Run `work` on the request named on the command line, then exit: 0, or an error's status after its event."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--request", type=Path, required=True)
    path = parser.parse_args().request
    _log_to_parent()
    request = kind.model_validate_json(path.read_bytes())
    leave(run_reported(lambda: work(request, emit)))


Works = Mapping[type[BaseModel], Callable[[Any, Emit], None]]
"""The work of a serving worker, by the kind of request."""


def is_asked_to_serve() -> bool:
    """Return True if a kept process starts here: it serves any number of requests, and its command line names none."""
    return sys.argv[1:] == [SERVE_OPTION]


def serve_requests(works: Works, *, afterwards: Callable[[], None]) -> None:
    """Run the requests that the parent names, one after the other, until it names no more or one fails; then exit.

    The first that does not end well ends the process, with its event and status as for a single request: no request
    ever runs in a process in which another one failed. afterwards: called after each; what it leaves must not matter
    to the next.
    """
    _log_to_parent()
    kinds = {kind.__name__: kind for kind in works}
    while line := parent_pipe().next_line():
        emit(TAKEN)
        name, path = json.loads(line)
        request, work = kinds[name].model_validate_json(Path(path).read_bytes()), works[kinds[name]]
        if status := run_reported(lambda request=request, work=work: work(request, emit)):  # type: ignore[misc]
            leave(status)
        del request
        afterwards()
        emit(SERVED)
    leave(0)


def emit(event: str, **fields: object) -> None:
    """Write an event as one line of standard output."""
    with _emitting:  # snapshots are reported by a thread of their own
        sys.stdout.write(events.encode(event, **fields))
        sys.stdout.flush()


def _log_to_parent() -> None:
    """Warnings of this project become events, which people see; everything else is ordinary output."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("relora_train").addHandler(_Warnings(logging.WARNING))
    quiet_libraries()


def quiet_libraries() -> None:
    """Silence what libraries tell of themselves on import: bitsandbytes names a kernel that nothing here uses."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more
            emit("warning", message=record.getMessage())


def leave(status: int) -> NoReturn:
    """Exit. A rank that failed leaves its group as it is, at once: the others may never come to say goodbye in it.

    A snapshot that is being written is finished first.
    """
    if status == 0 or "RANK" not in os.environ:
        sys.exit(status)
    for thread in threading.enumerate():
        if thread.name == SNAPSHOT_THREAD:
            thread.join(STOP_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_reported(work: Callable[[], object]) -> int:
    """Do the work and return the exit status; an error is told to the parent as the event `failed`."""
    kind: type[ReLoRAError]
    status = 1
    try:
        work()
        return 0
    except ReLoRAError as error:
        kind, message, status = type(error), str(error), error.exit_code
    except Exception as error:
        is_expected = SHARED_MEMORY in str(error) or os.strerror(errno.ENOSPC) in str(error)
        if not is_expected:
            traceback.print_exc()
        if SHARED_MEMORY in str(error):
            kind, status = DeviceError, DeviceError.exit_code
            message = (
                f"This machine's shared memory, {SHARED_MEMORY}, is full or too small ({error}). Ranks on one machine "
                "talk through it. Start the container with --shm-size=16g or --ipc=host; in Kubernetes mount an "
                f"emptyDir of medium Memory at {SHARED_MEMORY}."
            ).replace("\n", " ")
        elif is_expected:  # safetensors hides the errno
            kind, status = DiskFullError, DiskFullError.exit_code
            message = f"The disk is full ({error}). Free space, or set RELORA_CACHE to a larger disk, and run again."
        elif is_out_of_memory(error):
            kind = DeviceMemoryError
            advice = "Lower batch.micro_sequences or batch.sequence_length, or use a larger device."
            message = f"{error} {advice}".replace("\n", " ")
        elif may_pass(error):
            kind, message = TrainerCrashedError, f"{type(error).__name__}: {error}"
        else:
            kind = TrainerFaultError
            message = (
                f"{type(error).__name__}: {error}. It would come again at every try, so none follows. Change what the "
                "last lines below name (a setting, a file, a package), or report them."
            )
    emit("failed", error=kind.__name__, message=message)
    return status


def is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError by its name, and what allocators and libraries below it say, without importing torch."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS)


class StopRequest:
    """A flag that SIGTERM, SIGINT or the parent's death sets; read between two steps. Holds the signals in a `with`."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self.reason = ""
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, lambda told, frame: self._set(signal.Signals(told).name))
        if os.environ.get(PARENT_PIPE_VARIABLE):
            parent_pipe().on_end(self._parent_ended)
        return self

    def __exit__(self, *exception: object) -> None:
        if os.environ.get(PARENT_PIPE_VARIABLE):
            parent_pipe().on_end(None)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_set(self) -> bool:
        return self._flag.is_set()

    def on_lost_listener(self, emit: Emit) -> Emit:
        """Return the same Emit, for which a lost listener is a request to stop and no error in the middle of work."""

        def emit_or_stop(event: str, **fields: object) -> None:
            try:
                emit(event, **fields)
            except BrokenPipeError:
                self._parent_ended()

        return emit_or_stop

    def _parent_ended(self) -> None:
        self._set("the end of its parent process")

    def _set(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._flag.set()


class _ParentPipe:
    """Standard input, which the parent holds open as long as it lives: its lines and its end.

    Ranks share one. All may watch for its end; only the first may read.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._lock = threading.Lock()
        self._ended = False
        self._listener: Callable[[], None] | None = None
        threading.Thread(target=self._watch, name="parent-pipe", daemon=True).start()

    def next_line(self, seconds: float | None = None) -> str:
        """Wait for a line; empty at the end, or after so many seconds."""
        while b"\n" not in self._rest:
            if not select.select([0], [], [], seconds)[0] or not (data := os.read(0, 65536)):
                return ""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def on_end(self, listener: Callable[[], None] | None) -> None:
        """Call this at the end, instead of what was to be called; at once when that has come already."""
        with self._lock:
            self._listener = listener
            if self._ended and listener is not None:
                listener()

    def _watch(self) -> None:
        end = select.poll()
        end.register(0, select.POLLHUP)  # nothing is read, and data does not wake it
        end.poll()
        with self._lock:
            self._ended = True
            if self._listener is not None:
                self._listener()


parent_pipe = cache(_ParentPipe)  # one a process, from its first use
