"""Worker processes: start one, hear its events, map its end to an error; one for each request, or one kept for many.

Requests share a worker only if they need the same kind of process and follow on one that ended well. An error, a
diverged loss, a signal, a listener that fails, the end of this process: each ends the worker.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
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

_WORKER = "relora_train.worker"
"""The module as which every worker process starts, before that of its work."""

ONE_RANK = LaunchConfig()


@dataclass(frozen=True)
class Nodes:
    """This machine among those that run one worker together, in the words of torchrun."""

    nnodes: int
    rdzv_endpoint: str
    node_rank: int = 0
    """0 is the machine of the flow: its first rank writes files and events."""

    wait_seconds: int = 600
    """The time for which this machine waits for the others."""


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
    first: SIGTERM, and SIGKILL after 25 s. Its events meanwhile still go to on_event, after the event `stopping`.

    Raises the error the worker reported, else TrainerCrashedError with its exit status and last lines.
    """
    _write(request, request_path)
    command = ["-m", _WORKER, module, "--request", str(request_path)]
    if nproc_per_node != 1 or nodes is not None:
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
        command = ["-m", _WORKER, "relora_train.runs.agent", *place, *ranks, *command]
    worker = WorkerProcess(module, [sys.executable, *command], keep_secrets=keep_secrets)
    worker.listen(on_event)
    if not worker.ended_well:
        raise worker.error()


class Worker:
    """Runs requests as run_worker does; if it `keeps` a process, each in that of the one before. For one thread."""

    def __init__(self, *, keeps: bool = False) -> None:
        self._keeps = keeps
        self._worker: WorkerProcess | None = None
        self._kind: str | None = None

    def start(self, profile: Profile) -> None:
        """Start a process that imports what the profile's stages need, so that the first need not wait for it."""
        if self._keeps and profile.launch.nproc_per_node == 1 and profile.launch.nnodes == 1:
            self._fit(profile)

    def run(
        self,
        module: str,
        request: StageRequest | EvaluationRequest | ModelCheckRequest,
        request_path: Path,
        *,
        on_event: Callable[[Event], None],
        launch: LaunchConfig = ONE_RANK,
    ) -> None:
        """Run a request as run_worker does, with the same errors. Several ranks get processes of their own."""
        if not self._keeps or launch.nproc_per_node != 1 or launch.nnodes != 1:
            self.close()  # they need its memory
            ranks = launch.nproc_per_node
            nodes = Nodes(launch.nnodes, launch.rdzv_endpoint) if launch.nnodes > 1 and launch.rdzv_endpoint else None
            run_worker(module, request, request_path, on_event=on_event, nproc_per_node=ranks, nodes=nodes)
            return
        _write(request, request_path)
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
        kind = settings_digest(profile.model_dump(mode="json", include={"launch", "precision"}))
        if self._worker is not None and (self._kind != kind or not self._worker.is_alive):
            self.close()
        if self._worker is None:
            trainer = "relora_train.training.trainer"
            self._worker = WorkerProcess(trainer, [sys.executable, "-m", _WORKER, trainer, SERVE_OPTION])
            self._kind = kind
        return self._worker


def _write(request: FrozenConfig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(request.model_dump_json())
