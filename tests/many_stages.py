"""Several stages by the same ranks, one after the other: `python -m many_stages --request FILE`.

A stage may be stopped by a signal to its last rank, and then goes on from each of its snapshots, to an output with the
snapshot's step behind its name. A snapshot that a thread writes is held back until the next update is done. Each rank
leaves rank-<r>.json beside the first output: how many entries of the model, and of Adam's state, it held of each stage.
"""

import errno
import json
import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from sharded_variants import errors_of_variants
from torch import Tensor

from relora_train.checkpoints.layout import parse_snapshot_name
from relora_train.checkpoints.snapshots import local_snapshots
from relora_train.distributed import Ranks, local_shard, process_group
from relora_train.errors import TrainerInterruptedError
from relora_train.process import Emit, serve_request
from relora_train.settings.base import FrozenConfig
from relora_train.training import evaluate, snapshot, trainer
from relora_train.training.requests import EvaluationRequest, StageRequest
from relora_train.training.step import StageTraining


class Work(FrozenConfig):
    """One stage."""

    request: StageRequest
    stop_after: int | None = None

    disk_full: bool = False
    """No snapshot can be written."""


class ManyStages(FrozenConfig):
    """In this order."""

    stages: tuple[Work, ...]

    evaluations: tuple[EvaluationRequest, ...] = ()
    """Afterwards."""

    variants: Path
    """A directory for the models of sharded_variants."""


def train_all(plan: ManyStages, emit: Emit) -> None:
    held: dict[str, Any] = {}
    prepare, finish, update = trainer.prepare_stage, trainer._train, StageTraining.update
    stop_after: list[int] = []

    def recorded_prepare(request: StageRequest, ranks: Ranks) -> StageTraining:
        training = prepare(request, ranks)
        held["rank"] = ranks.rank
        record: dict[str, Any] = {"weights": 0, "all_weights": 0}
        record["orders"] = list(training.products.values())
        held[str(request.output_directory)] = record
        for parameter in training.model.parameters():
            record["weights"] += local_shard(parameter).numel()
            record["all_weights"] += parameter.numel()
        return training

    def recorded_train(training: StageTraining, *args: Any) -> None:
        sent.update(gathered=Counter(), scattered=Counter())
        finish(training, *args)
        held[str(training.request.output_directory)] |= {kind: dict(count) for kind, count in sent.items()}
        states = training.optimizer.state.values()
        held[str(training.request.output_directory)] |= {
            "moments": sum(local_shard(state["exp_avg"]).numel() for state in states),
            "all_moments": sum(state["exp_avg"].numel() for state in states),
        }

    def update_and_stop(training: StageTraining, step: int) -> tuple[Tensor, Tensor]:
        if step in stop_after and training.ranks.rank == training.ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        result = update(training, step)
        updated.append(step)
        return result

    def write_after_the_next_update(root: Path, request: StageRequest, state: Any, *args: Any) -> Any:
        if request.output_directory in full:
            held["not_written"] = [*held.get("not_written", []), state.step]
            raise OSError(errno.ENOSPC, "No space left on device")
        if threading.current_thread() is not threading.main_thread():
            deadline = time.monotonic() + 60
            while updated[-1] <= state.step and time.monotonic() < deadline:
                time.sleep(0.01)
            held["went_on"] = held.get("went_on", []) + [state.step] * (updated[-1] > state.step)
        return write(root, request, state, *args)

    def recorded_gather(output: Tensor, part: Tensor, **options: Any) -> Any:
        sent["gathered"][str(part.dtype)] += part.nbytes
        return gather(output, part, **options)

    def recorded_scatter(*, output: Tensor, input: Tensor, **options: Any) -> Any:
        sent["scattered"][str(input.dtype)] += input.nbytes
        return scatter(output=output, input=input, **options)

    sent: dict[str, Counter[str]] = {"gathered": Counter(), "scattered": Counter()}
    gather, scatter = dist.all_gather_single, dist.reduce_scatter_single
    dist.all_gather_single, dist.reduce_scatter_single = recorded_gather, recorded_scatter
    write, updated = snapshot.write_snapshot, [0]
    full = {work.request.output_directory for work in plan.stages if work.disk_full}
    snapshot.write_snapshot = write_after_the_next_update
    trainer.prepare_stage, trainer._train = recorded_prepare, recorded_train
    StageTraining.update = update_and_stop
    launch = plan.stages[0].request.profile.launch
    with process_group(launch.device) as ranks:
        for work in plan.stages:
            request = work.request
            if work.stop_after is not None:
                stop_after[:] = [work.stop_after]
                with suppress(TrainerInterruptedError):
                    trainer.run_stage(request, emit)
                stop_after.clear()
                ranks.barrier()
                for name in local_snapshots(request.snapshots_directory):
                    output = f"{request.output_directory}-{parse_snapshot_name(name)}"
                    changes = {
                        "snapshot_directory": request.snapshots_directory / name,
                        "snapshots_directory": None,
                        "output_directory": Path(output),
                    }
                    trainer.run_stage(request.model_copy(update=changes), emit)
                continue
            trainer.run_stage(request, emit)
        for evaluation in plan.evaluations:
            evaluate.evaluate_checkpoint(evaluation, emit)
        held["variants"] = errors_of_variants(ranks, plan.variants)
    first = plan.stages[0].request.output_directory
    (first.parent / f"rank-{held['rank']}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    serve_request(ManyStages, train_all)
