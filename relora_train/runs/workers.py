"""Worker processes: start one, hear its events, map its end to an error; one for each request, or one kept for many.

Requests share a worker only if they need the same kind of process and follow on one that ended well. An error, a
diverged loss, a signal, a listener that fails, the end of this process: each ends the worker.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relora_train.events import Event
from relora_train.process import SERVE_OPTION
from relora_train.runs.worker_process import WorkerProcess
from relora_train.settings.base import FrozenConfig
from relora_train.settings.keys import settings_digest
from relora_train.settings.profile import Profile
from relora_train.settings.running import LaunchConfig
from relora_train.training.requests import EvaluationRequest, ModelCheckRequest, StageRequest

WORKER = "relora_train.worker"
"""The module as which every worker process starts, before that of its work."""

_TRAINER = "relora_train.training.trainer"


@dataclass(frozen=True)
class Nodes:
    """This machine among those that run one worker together, in the words of torchrun."""

    nnodes: int
    rdzv_endpoint: str
    node_rank: int = 0
    """0 is the machine of the flow: its first rank writes files and events."""

    wait_seconds: int = 600
    """The time for which this machine waits for the others."""


def nodes_of(launch: LaunchConfig) -> Nodes | None:
    """Return the machines that a profile asks for, seen from the flow's, or None for one machine."""
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

    Every event of the worker goes to on_event, every other line of its output to the log. The worker sees
    no credentials unless keep_secrets. If an exception, Ctrl-C or a cancelled run ends this call early, the worker ends
    first: SIGTERM, and SIGKILL after 25 s. What it says meanwhile still goes to on_event, after the event `stopping`.

    Raises the error the worker reported, else TrainerCrashedError with its exit status and last lines.
    """
    _write_request(request, request_path)
    worker = WorkerProcess(module, _command(module, request_path, nproc_per_node, nodes), keep_secrets=keep_secrets)
    worker.listen(on_event)
    if not worker.ended_well:
        raise worker.error()


class KeptWorker:
    """Runs requests as run_worker does, and keeps the process from one to the next. For one thread at a time."""

    def __init__(self) -> None:
        self._worker: WorkerProcess | None = None
        self._kind: str | None = None

    def start(self, profile: Profile) -> None:
        """Start a process that imports what the profile's stages need, so that the first need not wait for it."""
        if profile.launch.nproc_per_node == 1 and profile.launch.nnodes == 1:
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
        """Run a request as run_worker does, with the same errors. Several ranks get processes of their own."""
        if nproc_per_node != 1 or nodes is not None:
            self.close()  # they need its memory
            run_worker(module, request, request_path, on_event=on_event, nproc_per_node=nproc_per_node, nodes=nodes)
            return
        _write_request(request, request_path)
        line = json.dumps([type(request).__name__, str(request_path)])
        while True:
            was_kept = self._worker is not None
            worker = self._fit(request.profile)
            self._worker = None  # unless this request ends well
            if worker.listen(on_event, line=line):
                self._worker = worker
                return
            if worker.took_request or not was_kept:  # else the kept one died idle, before this request
                raise worker.error()

    def close(self) -> None:
        """End an idle process at once: it holds nothing. Safe to repeat."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.close()

    def _fit(self, profile: Profile) -> WorkerProcess:
        """Return a living process of the kind that the profile asks for."""
        # Device, threads and precision are set once a process.
        sections = {"launch": profile.launch, "precision": profile.precision}
        kind = settings_digest({name: section.model_dump(mode="json") for name, section in sections.items()})
        if self._worker is not None and (self._kind != kind or not self._worker.is_alive):
            self.close()
        if self._worker is None:
            self._worker = WorkerProcess(_TRAINER, [sys.executable, "-m", WORKER, _TRAINER, SERVE_OPTION])
            self._kind = kind
        return self._worker


@contextlib.contextmanager
def kept_worker() -> Iterator[KeptWorker]:
    """Yield a worker that ends with the block."""
    worker = KeptWorker()
    try:
        yield worker
    finally:
        worker.close()


def _write_request(request: FrozenConfig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(request.model_dump_json())


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
