"""One worker process for as many requests as may share it: what it imports is imported once. Light.

Shared are only requests that need the same kind of process and follow on one that ended well. An error, a diverged
loss, a signal, a listener that fails, the end of this process: each ends the worker, as it ends that of `run_worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from relora_train.events import Event
from relora_train.process import SERVE_OPTION, SERVED, TAKEN
from relora_train.runs.launch import (
    WORKER,
    Nodes,
    WorkerOutput,
    close_worker,
    run_worker,
    start_worker,
    stop_worker,
    worker_error,
)
from relora_train.settings.keys import settings_digest
from relora_train.settings.profile import Profile
from relora_train.training.requests import EvaluationRequest, ModelCheckRequest, StageRequest

_MODULE = "relora_train.training.trainer"


class KeptWorker:
    """Runs requests like run_worker, and keeps the process from one to the next. For one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._output: WorkerOutput | None = None
        self._kind: str | None = None

    def start(self, profile: Profile) -> None:
        """Have a process import what the profile's stages need, so that the first one need not wait for it."""
        if _alone(profile):
            self._fit(profile)

    def run(
        self,
        module: str,
        request: StageRequest | EvaluationRequest | ModelCheckRequest,
        request_path: Path,
        *,
        on_event: Callable[[Event], None],
        nproc_per_node: int | Literal["gpu"] = 1,
        nodes: Nodes | None = None,
    ) -> None:
        """As run_worker, with the same errors. Several ranks are a process group of their own each time."""
        if nproc_per_node != 1 or nodes is not None:
            self.close()  # they need its memory
            run_worker(module, request, request_path, on_event=on_event, nproc_per_node=nproc_per_node, nodes=nodes)
            return
        request_path.parent.mkdir(parents=True, exist_ok=True)
        request_path.write_text(request.model_dump_json())
        line = [type(request).__name__, str(request_path)]
        fresh = self._process is None
        while not self._serve(*self._fit(request.profile), line, on_event, may_be_gone=not fresh):
            fresh = True  # the kept one died idle, before this request

    def close(self) -> None:
        """End an idle process at once: it holds nothing. Safe to repeat."""
        process, output, self._process = self._process, self._output, None
        if process is None or output is None:
            return
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        close_worker(process, output)

    def _fit(self, profile: Profile) -> tuple[subprocess.Popen[str], WorkerOutput]:
        """A living process of the kind that the profile asks for."""
        kind = _kind_of(profile)
        if self._process is not None and self._output is not None:
            if self._process.poll() is None and self._kind == kind:
                return self._process, self._output
            self.close()
        self._process = start_worker([sys.executable, "-m", WORKER, _MODULE, SERVE_OPTION])
        self._output, self._kind = WorkerOutput(self._process), kind
        return self._process, self._output

    def _serve(
        self,
        process: subprocess.Popen[str],
        output: WorkerOutput,
        line: list[str],
        on_event: Callable[[Event], None],
        *,
        may_be_gone: bool,
    ) -> bool:
        """Whether the request was done; False for a process that did not even take it, where that may be."""
        failures: list[Event] = []
        taken = False
        try:
            output.tail.clear()
            with contextlib.suppress(BrokenPipeError):  # it has just died: its status will say how
                _write(process, line)
            for event in output.events():
                if event["event"] == SERVED:
                    return True
                if event["event"] == TAKEN:
                    taken = True
                elif event["event"] == "failed":
                    failures.append(event)
                else:
                    on_event(event)
            status = process.wait()
        except BaseException:
            self._process = None
            try:
                stop_worker(process, output, on_event)
            finally:
                close_worker(process, output)
            raise
        self._process = None
        close_worker(process, output)
        if may_be_gone and not taken:
            return False
        raise worker_error(_MODULE, failures, status, output.tail)


@contextlib.contextmanager
def kept_worker() -> Iterator[KeptWorker]:
    """A worker for the length of the block."""
    worker = KeptWorker()
    try:
        yield worker
    finally:
        worker.close()


def _write(process: subprocess.Popen[str], line: list[str]) -> None:
    if process.stdin is not None:
        process.stdin.write(f"{json.dumps(line)}\n")
        process.stdin.flush()


def _alone(profile: Profile) -> bool:
    return profile.launch.nproc_per_node == 1 and profile.launch.nnodes == 1


def _kind_of(profile: Profile) -> str:
    """Digest of the settings that are set once a process: device, threads, precision."""
    return settings_digest(
        {"launch": profile.launch.model_dump(mode="json"), "precision": profile.precision.model_dump(mode="json")}
    )
