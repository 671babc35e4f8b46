"""Train one stage in a process of its own: `python -m relora_train.training.trainer --request FILE`.

Under torchrun for several ranks, which a flow keeps for many stages (kept_ranks.py). With --serve, stages and
evaluations one after the other (workers.py), each as if it were alone. No orchestrator, no network beyond the ranks',
no credentials. Events go to standard output (events.py).
"""

import dataclasses
import logging
import os
import shutil
import time
from collections import Counter

import torch

from relora_train.data.left_out import too_long_note
from relora_train.distributed import SLOW, STEP, process_group
from relora_train.errors import TrainerInterruptedError
from relora_train.method.update_size import UpdateMeter
from relora_train.process import Emit, StopRequest, Works, is_asked_to_serve, serve_request, serve_requests
from relora_train.storage.workspace import trainer_lock
from relora_train.training.build import first_weights_directory, prepare_stage
from relora_train.training.end_of_cycle import finish_stage
from relora_train.training.evaluate import evaluate_checkpoint, evaluate_stage
from relora_train.training.model_check_worker import check_model
from relora_train.training.precision import settle_matmul_precision
from relora_train.training.progress import (
    Timer,
    attempt_record,
    check_learning,
    diverged,
    low_rank_gradient_norms,
)
from relora_train.training.requests import EvaluationRequest, ModelCheckRequest, StageRequest
from relora_train.training.snapshot import Progress, Snapshotter, read_snapshot_state, restore_snapshot
from relora_train.training.step import StageTraining
from relora_train.training.torch_settings import configure_torch, peak_bytes, release_memory, reset_peak

_LOGGER = logging.getLogger("relora_train.training.trainer")  # this module runs as __main__
_PROGRESS_SECONDS = 0.5
_FIRST_STEPS = 5
"""Updates of a stage that are recorded one by one: they show that A and B are alive, and what a reset did to them."""


def run_stage(request: StageRequest, emit: Emit) -> None:
    """Train the stage and leave a committed checkpoint in request.output_directory, or raise and leave none.

    With request.snapshot_directory it goes on from there, on a CPU to the same bits as without the stop.
    Raises DivergedError on a loss that is not finite or above twice that of guessing, TrainerInterruptedError when told
    to stop, and the errors of loading.
    """
    launch = request.profile.launch
    with (
        StopRequest() as stop,
        process_group(launch.device) as ranks,
        trainer_lock(request.lock_path if ranks.is_first else None),
    ):
        configure_torch(request.profile)
        timer = Timer()
        ranks = dataclasses.replace(ranks, sharded=launch.sharding == "full" and ranks.world_size > 1)
        # Ranks other than the first report nothing but failures.
        emit = stop.on_lost_listener(emit) if ranks.is_first else (lambda event, **fields: None)
        training = prepare_stage(request, ranks)
        stage, snapshot = training.stage, request.snapshot_directory
        # Measured in a run's first stage alone: a later one, or a resumed one, computes to the same bits as its parent.
        recorded = training.start.matmul_precision
        if snapshot is not None:
            recorded = read_snapshot_state(snapshot).matmul_precision
        training.matmul = settle_matmul_precision(training.profile, training.model, ranks, recorded=recorded)
        timer.end("load")
        parameters = list(training.model.parameters())
        emit(
            "stage_started",
            stage=stage.name,
            kind=stage.kind,
            start_step=stage.start_step,
            end_step=stage.end_step,
            pid=os.getpid(),
            device=str(ranks.device),
            ranks=ranks.world_size,
            parameters=sum(p.numel() for p in parameters),
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            products=dict(Counter(training.products.values())),
            **({"matmul": training.matmul} if training.matmul else {}),
        )
        if snapshot is not None:
            progress = restore_snapshot(training, snapshot)
            emit("resumed", stage=stage.name, step=progress.step, snapshot=str(snapshot))
        else:
            losses = torch.zeros((), dtype=torch.float64, device=ranks.device)
            progress = Progress(step=stage.start_step, metrics=[], losses=losses, summed=0, seconds=0.0)
            if left_out := training.train_data.left_out:
                progress.metrics.append({"kind": "data", "step": stage.start_step, **left_out})
                if request.parent is None and ranks.is_first and (note := too_long_note(left_out)):
                    _LOGGER.warning("%s. batch.too_long says what becomes of them.", note.capitalize())
        timer.began -= progress.seconds
        metrics = progress.metrics
        attempts = sum(record["kind"] == "attempt" for record in metrics)  # in front: the last record stays the last
        metrics.insert(attempts, attempt_record(ranks, progress.step))
        before = evaluate_stage(training, metrics, emit, when="before")
        timer.end("evaluate_before")
        reset_peak(ranks.device)
        _train(training, progress, emit, stop, timer)
        timer.end("steps")
        metrics.append({"kind": "memory", "step": stage.end_step, "peak_bytes": peak_bytes(ranks.device)})
        finish_stage(training, metrics, emit, before=before, timer=timer)
        if ranks.is_first:
            shutil.rmtree(first_weights_directory(request), ignore_errors=True)


def _train(training: StageTraining, progress: Progress, emit: Emit, stop: StopRequest, timer: Timer) -> None:
    """Update by update from progress.step to the end of the stage, or until asked to stop."""
    stage, every = training.stage, training.profile.logging.every_steps
    metrics, losses, first_step = progress.metrics, progress.losses, progress.step
    first_step_at = last_record = time.monotonic()
    timed, last_progress = 0, 0.0
    snapshotter = Snapshotter(training, emit)
    meter = UpdateMeter(training.model)
    for step in range(first_step + 1, stage.end_step + 1):
        first_steps = step <= stage.start_step + _FIRST_STEPS
        measured = stage.low_rank and (first_steps or step == stage.end_step)
        if measured:
            meter.begin()
        loss, norm = training.update(step)
        check_learning(training, step)
        losses += loss
        progress.step = step
        progress.summed += 1
        timed += 1
        now = time.monotonic()
        if step % every == 0 or step == stage.end_step or first_steps:
            mean = float(losses) / progress.summed  # the host waits for the device here, and in no other update
            record = {
                "kind": "train",
                "step": step,
                "loss": mean,
                "learning_rate": training.learning_rate(step),
                "grad_norm": float(norm),
                "tokens_per_second": timed * training.profile.batch.tokens / max(now - last_record, 1e-9),
                "tokens_seen": training.tokens_seen(step),
                "data_wait_share": training.batches.take_seconds_waited() / max(now - last_record, 1e-9),
                "seconds": timer.stage_seconds(),
            }
            if first_steps and stage.low_rank:
                record |= low_rank_gradient_norms(training)
            if measured:
                record |= meter.end()
            metrics.append(record)
            if not mean <= 2 * training.objective.guessing_loss(training.train_data.manifest):  # so also for NaN
                raise diverged(training, step, mean, "training loss", metrics)
            losses.zero_()
            progress.summed, timed, last_record = 0, 0, now
        training.optimizer.zero_grad(set_to_none=True)
        if metrics[-1]["kind"] == "train" and (now - last_progress >= _PROGRESS_SECONDS or step == stage.end_step):
            last_progress, latest = now, metrics[-1]
            emit(
                "progress",
                stage=stage.name,
                step=step,
                start_step=stage.start_step,
                end_step=stage.end_step,
                loss=latest["loss"],
                learning_rate=training.learning_rate(step),
                tokens_per_second=latest["tokens_per_second"],
                data_wait_share=latest.get("data_wait_share", 0.0),  # a snapshot may be older than the field
                eta_seconds=(now - first_step_at) / (step - first_step) * (stage.end_step - step),
            )
        progress.seconds = timer.stage_seconds()
        stopping = training.ranks.any(stop.is_set())
        if step == first_step + 1:  # on all ranks
            training.ranks.expect_answers_within(STEP)
        if stopping:
            # Also a barrier: the first rank to leave would end the others, perhaps while one still writes.
            saved = training.ranks.any(snapshotter.at_stop(progress))
            where = f"was stopped by {stop.reason or 'another rank'} at step {step} of {stage.end_step}"
            kept = "its state there was saved; the same command goes on from it"
            raise TrainerInterruptedError(
                f"Stage {stage.name} {where}: {kept if saved else 'run the same command again'}."
            )
        if step < stage.end_step:
            snapshotter.after_step(progress)
    training.ranks.expect_answers_within(SLOW)
    snapshotter.wait()


if __name__ == "__main__":
    if is_asked_to_serve():  # for as long as the parent has any
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 (seconds, while nobody waits yet)

        works: Works = {StageRequest: run_stage, EvaluationRequest: evaluate_checkpoint, ModelCheckRequest: check_model}
        serve_requests(works, afterwards=release_memory)
    else:
        serve_request(StageRequest, run_stage)
