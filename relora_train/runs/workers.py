"""Worker processes: start one, hear its events, map its end to an error; one for each request, or one kept for many.

Requests share a worker only if they need the same kind of process and follow on one that ended well. An error, a
diverged loss, a signal, a listener that fails, the end of this process: each ends the worker.

Several ranks are one such process to the flow: torch's launcher on this machine, which a Worker keeps for all stages
of a run. The first rank alone talks to the flow and writes.

Several machines train together: the flow's has node rank 0. On each other one join_run starts a launcher. They meet at
launch.rdzv_endpoint, a port on the flow's machine that is open while ranks are kept there. A stage that fails ends all
of them, and they meet again for the next attempt.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

from pydantic import ValidationError

from relora_train.devices import check_devices
from relora_train.errors import ConfigError, ReLoRAError, TrainerCrashedError
from relora_train.events import Event
from relora_train.process import NO_MORE, SERVE_OPTION, STOP_SECONDS
from relora_train.runs.worker_process import WorkerProcess
from relora_train.settings.base import FrozenConfig
from relora_train.settings.keys import settings_digest
from relora_train.settings.profile import Profile
from relora_train.settings.running import LaunchConfig
from relora_train.training.requests import EvaluationRequest, ModelCheckRequest, RanksRequest, StageRequest

_WORKER = "relora_train.worker"
"""The module as which every worker process starts, before that of its work."""

_KEPT_RANKS = "relora_train.training.kept_ranks"

_DISMISS_SECONDS = 60
"""The time that other machines have to be there, if all they are to hear is that nothing is left to train."""

ONE_RANK = LaunchConfig()
READY_WORKER: ContextVar["Worker | None"] = ContextVar("READY_WORKER", default=None)
"""A worker that was started ahead of a flow, for the first run that it trains."""

_LOGGER = logging.getLogger(__name__)


def run_worker(
    module: str,
    request: FrozenConfig,
    request_path: Path,
    *,
    on_event: Callable[[Event], None],
    launch: LaunchConfig = ONE_RANK,
    node_rank: int = 0,
    wait_seconds: int = 600,
    keep_secrets: bool = False,
) -> None:
    """Run `python -m module --request request_path` to its end, under torch's elastic launcher for several ranks.

    This machine is number node_rank of launch.nnodes, and waits so long for the others.

    Every event of the worker goes to on_event, every other line of its output to the log. The worker sees
    no credentials unless keep_secrets. If an exception, Ctrl-C or a cancelled run ends this call early, the worker ends
    first: SIGTERM, and SIGKILL after 25 s. Its events meanwhile still go to on_event, after the event `stopping`.

    Raises the error the worker reported, else TrainerCrashedError with its exit status and last lines.
    """
    _write(request, request_path)
    command = _command(module, request_path, launch, node_rank=node_rank, wait_seconds=wait_seconds)
    worker = WorkerProcess(module, command, keep_secrets=keep_secrets)
    worker.listen(on_event)
    if not worker.ended_well:
        raise worker.error()


class Worker:
    """Runs requests as run_worker does; if it `keeps` a process, each in that of the one before. For one thread."""

    def __init__(self, *, keeps: bool = False) -> None:
        self._keeps = keeps
        self._worker: WorkerProcess | None = None
        self._kind = "", ""

    def start(self, profile: Profile) -> None:
        """Start a process that imports what the profile's stages need, so that the first need not wait for it."""
        if self._keeps and profile.launch.world_size == 1:
            self._fit(profile, ONE_RANK, Path())

    def run(
        self,
        module: str,
        request: StageRequest | EvaluationRequest | ModelCheckRequest,
        request_path: Path,
        *,
        on_event: Callable[[Event], None],
        launch: LaunchConfig = ONE_RANK,
    ) -> None:
        """Run a request as run_worker does, with the same errors."""
        if not self._keeps and launch.nnodes == 1:
            run_worker(module, request, request_path, on_event=on_event, launch=launch)
            return
        _write(request, request_path)
        line = json.dumps([type(request).__name__, str(request_path)])
        self._serve(line, request.profile, launch, request_path.parent, on_event)
        if not self._keeps:
            self.dismiss(request.profile)

    def dismiss(self, profile: Profile) -> None:
        """Tell the profile's other machines, which train along or wait for a stage, that none is left; ranks end."""
        if profile.launch.nnodes == 1:
            return
        _LOGGER.info("No stage is left: the machines at %s are told so.", profile.launch.rdzv_endpoint)
        try:
            with tempfile.TemporaryDirectory(prefix="relora-dismiss-") as directory:
                self._serve(NO_MORE, profile, profile.launch, Path(directory), lambda event: None, _DISMISS_SECONDS)
                self.close()
        except ReLoRAError as error:
            _LOGGER.info("Not all of them were there to be told within %d s: %s", _DISMISS_SECONDS, error)

    def close(self) -> None:
        """End an idle process: it holds nothing. Safe to repeat."""
        worker, self._worker = self._worker, None
        if worker is not None:
            # Killed at once, a launcher would leave its ranks behind.
            worker.close(seconds=STOP_SECONDS if self._kind[0] == _KEPT_RANKS else 0)

    def _serve(
        self,
        line: str,
        profile: Profile,
        launch: LaunchConfig,
        directory: Path,
        on_event: Callable[[Event], None],
        wait_seconds: int = 600,
    ) -> None:
        """Have a process of the profile's kind, kept or new, serve what the line names."""
        while True:
            kept = self._worker
            worker = self._fit(profile, launch, directory, wait_seconds)
            self._worker = None  # unless this request ends well
            if worker.listen(on_event, line=line):
                self._worker = worker
                return
            if worker.took_request or worker is not kept:  # else it died idle, before this request
                raise worker.error()

    def _fit(self, profile: Profile, launch: LaunchConfig, directory: Path, wait_seconds: int = 600) -> WorkerProcess:
        """Return a living process of the kind that the profile asks for."""
        # Device, threads and precision are set once a process.
        module = "relora_train.training.trainer" if launch.world_size == 1 else _KEPT_RANKS
        settings = profile.model_dump(mode="json", include={"launch", "precision"})
        kind = module, settings_digest({**settings, "ranks": [launch.nproc_per_node, launch.nnodes]})
        if self._worker is not None and (self._kind != kind or not self._worker.is_alive):
            self.close()
        if self._worker is None:
            command = [sys.executable, "-m", _WORKER, module, SERVE_OPTION]
            if launch.world_size != 1:
                _write(RanksRequest(device=profile.launch.device), directory / "ranks.json")
                command = _command(module, directory / "ranks.json", launch, wait_seconds=wait_seconds)
            self._worker, self._kind = WorkerProcess(module, command), kind
        return self._worker


def join_run(
    *,
    rdzv_endpoint: str,
    nnodes: int,
    node_rank: int,
    nproc_per_node: str,
    device: str,
    wait_seconds: int,
    tell: Callable[[str], None],
) -> int:
    """Take part in every stage that begins at the endpoint; return how many, once the flow says that none is left.

    Also returns when a stage or its flow did not end well and no further stage has begun for wait_seconds.

    A stage that fails or is stopped is the flow's to report and to repeat; this machine is there for the next attempt.
    Raises ConfigError for settings that fit no flow, DeviceError for GPUs that are not here, and
    TrainerCrashedError when no stage began at all.
    """
    count = int(nproc_per_node) if nproc_per_node.isdecimal() else nproc_per_node
    settings = {"nnodes": nnodes, "rdzv_endpoint": rdzv_endpoint, "nproc_per_node": count, "device": device}
    try:
        launch = LaunchConfig.model_validate(settings)
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0] if fault['loc'] else ''} {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"These settings fit no flow: {faults}.") from None
    if not 1 <= node_rank < nnodes:
        raise ConfigError(f"--node-rank {node_rank} is not one of 1 … {nnodes - 1}; the flow's machine has 0.")
    check_devices(launch)  # a rank that fails once all have met would end the flow's stage
    joined: list[Event] = []

    def on_event(event: Event) -> None:
        if event["event"] == "joined":
            tell(f"Joined stage {event['stage']} of run {event['run_id']} with {event['ranks']} ranks in all.")
            joined.append(event)

    deadline = time.monotonic() + wait_seconds
    last_error = "no agent was started"
    while (left := deadline - time.monotonic()) > 0:
        stages = len(joined)
        try:
            with tempfile.TemporaryDirectory(prefix="relora-join-") as directory:
                run_worker(
                    _KEPT_RANKS,
                    RanksRequest(device=launch.device),
                    Path(directory) / "request.json",
                    on_event=on_event,
                    launch=launch,
                    node_rank=node_rank,
                    wait_seconds=max(1, round(left)),
                )
            return len(joined)
        except ReLoRAError as error:
            if len(joined) == stages and not isinstance(error, TrainerCrashedError):
                raise  # this machine's own fault, such as a GPU that is not there
            last_error = str(error)
        if len(joined) > stages:
            tell(f"The flow's machine or a rank was lost; waiting for the next stage: {last_error.splitlines()[0]}")
            deadline = time.monotonic() + wait_seconds
        time.sleep(0.5)
    if not joined:
        raise TrainerCrashedError(
            f"No stage began at {rdzv_endpoint} within {wait_seconds} s. Start the run on that machine with "
            f"launch.nnodes={nnodes} and this launch.rdzv_endpoint, or see what it says. Last here: {last_error}"
        )
    return len(joined)


def _command(
    module: str, request_path: Path, launch: LaunchConfig, *, node_rank: int = 0, wait_seconds: int = 600
) -> list[str]:
    """Return the command that runs a request, under torch's elastic launcher for several ranks."""
    work = ["-m", _WORKER, module, "--request", str(request_path)]
    if launch.world_size == 1:
        return [sys.executable, *work]
    place = ["--standalone"]
    if launch.nnodes > 1:
        # Not the elastic backend: it would put the first rank, which speaks to the flow, on any of the machines.
        place = [
            "--rdzv-backend=static",
            f"--rdzv-endpoint={launch.rdzv_endpoint}",
            f"--rdzv-conf=timeout={wait_seconds}",
            f"--nnodes={launch.nnodes}",
            f"--node-rank={node_rank}",
        ]
    log_dir = request_path.parent / "torchrun"  # else each launch leaves a directory in the system's temporary one
    ranks = [f"--nproc-per-node={launch.nproc_per_node}", f"--log-dir={log_dir}"]
    return [sys.executable, "-m", _WORKER, "relora_train.runs.agent", *place, *ranks, *work]


def _write(request: FrozenConfig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(request.model_dump_json())
