"""The end of a stage: merge, re-initialise, reset the optimizer, check that the function stayed, evaluate, commit."""

import math
from typing import Any, cast

import torch
from torch import Tensor

from relora_train.checkpoints.layout import checkpoint_name
from relora_train.errors import DivergedError, TrainingError
from relora_train.method.experts import has_experts
from relora_train.method.layer import lora_parameters
from relora_train.method.merge import merge_and_reinit
from relora_train.method.reset import reset_optimizer_state
from relora_train.process import Emit
from relora_train.training.commit import Adapter, commit_stage
from relora_train.training.evaluate import evaluate_stage
from relora_train.training.models.base import Evaluation
from relora_train.training.models.compiling import without_compiling
from relora_train.training.models.model import evaluating
from relora_train.training.models.registry import facts_of
from relora_train.training.peft_export import adapter_config, adapter_state
from relora_train.training.precision import MatmulPrecision, keeps_accuracy, products_of
from relora_train.training.progress import Timer, diverged
from relora_train.training.step import StageTraining
from relora_train.training.torch_settings import autocast

_PROBE_SEQUENCES = 4
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1, "nf4": 0.5}
"""Largest change of the output that rounding alone can explain, relative to the largest logit."""


def finish_stage(
    training: StageTraining,
    metrics: list[dict[str, Any]],
    emit: Emit,
    *,
    before: Evaluation,
    timer: Timer,
) -> None:
    """Merge if the stage is low-rank, evaluate, and commit; the first rank writes.

    Nothing is committed if output or validation loss are not finite (DivergedError), the merge changed the function
    (TrainingError), or the files are wrong (CheckpointCorruptError).
    """
    stage, ranks = training.stage, training.ranks
    adapter: Adapter | None = None
    merge_report: dict[str, Any] = {}
    if stage.low_rank:
        adapter = stage_adapter(training)
        merge_report = finish_cycle(training, metrics, emit)
    timer.end("merge")
    after = evaluate_stage(training, metrics, emit, when="after")
    timer.end("evaluate_after")
    if not math.isfinite(after.val_loss):
        raise diverged(training, stage.end_step, after.val_loss, "validation loss")
    if ranks.is_first or ranks.sharded:
        commit_stage(
            training,
            metrics=metrics,
            adapter=adapter,
            merge_report=merge_report,
            before=before,
            after=after,
            stage_seconds=timer.stage_seconds(),
        )
    if ranks.is_first:
        timer.end("write")
        emit(
            "stage_committed",
            stage=stage.name,
            step=stage.end_step,
            directory=str(training.request.output_directory),
            seconds=timer.seconds,
        )
    ranks.barrier()  # the first rank to leave would end the others, one of which still writes


def stage_adapter(training: StageTraining) -> Adapter:
    """Return the A and B that the merge is about to consume, in PEFT's form."""
    parent = training.request.parent
    base = checkpoint_name(parent.step, parent.fingerprint) if parent else None
    config = adapter_config(training.model, base_model_name_or_path=base, task_type=training.objective.adapter_task)
    return adapter_state(training.model), config


def finish_cycle(training: StageTraining, metrics: list[dict[str, Any]], emit: Emit) -> dict[str, Any]:
    """Merge, redraw A, zero B, prune Adam's state, and return the merge report.

    Raises TrainingError if the output changed by more than rounding: such a checkpoint is not to be trusted.
    """
    stage, profile = training.stage, training.profile
    before = _probe_output(training)
    if not bool(before.isfinite().all()):
        raise DivergedError(
            f"The model's output is not finite at step {stage.end_step}, the last of stage {stage.name}: the run "
            "diverged and nothing of this stage was committed. Lower optimizer.learning_rate, or set "
            "divergence.on_divergence = 'lower_lr'."
        )
    layers = merge_and_reinit(training.model, cycle=stage.cycle, seed=profile.seed, masters=training.masters)
    change = relative_change(before, _probe_output(training))
    reset = reset_optimizer_state(
        training.optimizer,
        lora_parameters(training.model),
        **profile.optimizer_reset.model_dump(),
        seed=profile.seed,
        cycle=stage.cycle,
    )
    update = sum(layer.update_norm**2 for layer in layers.values())
    weight = sum(layer.weight_norm**2 for layer in layers.values())
    # Of A's and B's gradients in the cycle's first steps the largest are told: zero would mean that it trained nothing.
    gradients = {
        f"first_{name}": max(record[name] for record in metrics if name in record)
        for name in ("lora_A_grad_norm", "lora_B_grad_norm")
        if any(name in record for record in metrics)
    }
    summary = {
        "cycle": stage.cycle,
        "max_relative_output_change": change,
        "relative_update_norm": float((update / weight) ** 0.5) if weight else 0.0,
        "effective_rank": sum(layer.effective_rank for layer in layers.values()) / len(layers),
        "optimizer_state_zeroed": reset.share_zeroed,
        **gradients,
    }
    metrics.append({"kind": "merge", "step": stage.end_step, **summary})
    emit("merge", stage=stage.name, step=stage.end_step, **summary)
    limit = _ROUNDING["float32"]
    if change > limit:
        # So much is a fault, unless weights are held rounded or this device's products are: "medium" and TF32 are, on
        # some, whatever the setting says. So that is measured.
        products = products_of(training.model, rows=_PROBE_SEQUENCES * facts_of(profile).rows_per_sequence())
        frozen = profile.precision.frozen_as
        exact = frozen == profile.precision.dtype == "float32" and keeps_accuracy(
            products, training.ranks.device, cast(MatmulPrecision, torch.get_float32_matmul_precision())
        )
        limit = _ROUNDING["float32"] if exact else max(_ROUNDING["bfloat16"], _ROUNDING[frozen])
    masters_change = max(layer.master_change for layer in layers.values())
    # These are not rounded: what they give must stay. For a last bit a router sends a token that is near a tie to
    # another expert, so the output of a model with experts tells nothing.
    if not masters_change <= _ROUNDING["float32"] or has_experts(training.model):
        change, limit = masters_change, _ROUNDING["float32"]
    if not change <= limit:  # so also for NaN
        raise TrainingError(
            f"Merging cycle {stage.cycle} changed the model's output by {change:.2g} of its largest logit, more than "
            f"rounding can ({limit:g}). Nothing was committed. This is a fault of the merge: please report it with the "
            "profile; precision.dtype = 'float32' may avoid it."
        )
    told = ("update_norm", "weight_norm", "relative_update_norm", "effective_rank")
    records = {f"{name}.weight": {key: getattr(layer, key) for key in told} for name, layer in layers.items()}
    return {**summary, "layers": records}


@torch.no_grad()
def _probe_output(training: StageTraining) -> Tensor:
    """Return the logits of a few held-out examples, without dropout."""
    rows = training.val_data.read_blocks(0, min(_PROBE_SEQUENCES, training.val_data.blocks))
    examples = torch.from_numpy(rows).to(training.ranks.device)
    with evaluating(training.model), autocast(training.profile.precision, examples.device), without_compiling():
        return training.loss_function.logits(examples).float()


def relative_change(before: Tensor, after: Tensor) -> float:
    """Return the largest change of an entry, relative to the largest entry."""
    return float((after - before).abs().max() / before.abs().max())
