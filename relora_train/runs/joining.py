"""Take part in training from another machine than the flow's: one torchrun agent a stage, while stages begin.

The flow's machine has node rank 0 and the first rank, which alone talks to the flow and writes. Agents meet at
launch.rdzv_endpoint, a port on the flow's machine that is open while a stage runs there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from relora_train.devices import check_devices
from relora_train.errors import ConfigError, ReLoRAError, TrainerCrashedError
from relora_train.events import Event
from relora_train.runs.workers import Nodes, run_worker
from relora_train.settings.running import LaunchConfig
from relora_train.training.requests import JoinRequest

_PAUSE_SECONDS = 0.5


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
    """Take part in every stage that begins at the endpoint; return how many, after a run's last one has ended well.

    Also returns when no further stage has begun for wait_seconds.

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
            if not joined:  # each rank of this machine says it
                tell(f"Joined stage {event['stage']} of run {event['run_id']} with {event['ranks']} ranks in all.")
            joined.append(event)

    deadline = time.monotonic() + wait_seconds
    stages, last_error = 0, "no agent was started"
    while (left := deadline - time.monotonic()) > 0:
        joined.clear()
        nodes = Nodes(nnodes, rdzv_endpoint, node_rank, wait_seconds=max(1, round(left)))
        try:
            with tempfile.TemporaryDirectory(prefix="relora-join-") as directory:
                run_worker(
                    "relora_train.training.joined_trainer",
                    JoinRequest(device=launch.device),
                    Path(directory) / "request.json",
                    on_event=on_event,
                    nproc_per_node=launch.nproc_per_node,
                    nodes=nodes,
                )
            if joined and joined[0]["last"]:
                return stages + 1
        except ReLoRAError as error:
            if not joined and not isinstance(error, TrainerCrashedError):
                raise  # this machine's own fault, such as a GPU that is not there
            last_error = str(error)
            if joined:
                tell(f"The stage did not end well here: {str(error).splitlines()[0]}")
        if joined:
            stages += 1
            deadline = time.monotonic() + wait_seconds
        time.sleep(_PAUSE_SECONDS)
    if not stages:
        raise TrainerCrashedError(
            f"No stage began at {rdzv_endpoint} within {wait_seconds} s. Start the run on that machine with "
            f"launch.nnodes={nnodes} and this launch.rdzv_endpoint, or see what it says. Last here: {last_error}"
        )
    return stages
