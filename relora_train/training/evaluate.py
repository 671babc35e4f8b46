"""Held-out scores of a model, weighted by what was scored, and the process that scores a committed checkpoint."""

import dataclasses
import json
from typing import Any

import torch
from torch import nn

from relora_train.data.dataset import ExampleDataset
from relora_train.distributed import Ranks, process_group
from relora_train.process import Emit, serve_request
from relora_train.settings.keys import settings_digest
from relora_train.settings.running import PrecisionConfig
from relora_train.training.models.base import Evaluation, LossFunction, Objective
from relora_train.training.models.compiling import without_compiling
from relora_train.training.models.model import evaluating
from relora_train.training.models.registry import objective_of
from relora_train.training.requests import EvaluationRequest, StageRequest
from relora_train.training.sharding import rows_of_checkpoint, shard_model
from relora_train.training.step import StageTraining
from relora_train.training.torch_settings import autocast, configure_torch


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    loss_function: LossFunction,
    dataset: ExampleDataset,
    objective: Objective,
    ranks: Ranks,
    *,
    sequences: int,
) -> Evaluation:
    """Score `sequences` examples spread evenly over the validation split, or all; the same for any batch size.

    Sums in float64, so batches of unequal size weigh by their terms. Leaves the model's mode as it was.
    """
    sums = torch.zeros(objective.sums_for(dataset.manifest), dtype=torch.float64, device=ranks.device)
    count, batch_sequences = min(sequences, dataset.blocks), objective.profile.evaluation.batch_sequences
    with evaluating(model), without_compiling():
        for first in range(0, count, ranks.world_size * batch_sequences):
            start = first + ranks.rank * batch_sequences
            idle = start >= count
            if idle and not ranks.sharded:
                break
            size = 1 if idle else min(batch_sequences, count - start)
            rows = dataset.read_spread(0 if idle else start, size, of=count)
            with autocast(objective.profile.precision, ranks.device):
                found = loss_function.sums(torch.from_numpy(rows).to(ranks.device))
            if not idle:  # else it only lent its rows to the others
                sums += found
    ranks.sum(sums)
    return objective.summarize(sums.tolist(), dataset)


def hold_as_computed(model: nn.Module, precision: PrecisionConfig) -> None:
    """Under autocast, hold linear layers in bfloat16, as it rounds them for each product: the same scores in half the
    memory. Norms and embeddings, also one that is the head, stay float32: it does not round those.
    """
    if not precision.computes_in_bfloat16:
        return
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in looked_up:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def evaluate_stage(training: StageTraining, metrics: list[dict[str, Any]], emit: Emit, *, when: str) -> Evaluation:
    """Score the stage's start ('before') or its end ('after'), and add the scores to the metrics.

    The start's scores are taken from a resumed stage's records, or from the parent if it was scored alike.
    """
    objective, start = training.objective, training.start
    known = [record for record in metrics if record["kind"] == "evaluation" and record["when"] == when]
    if known:
        return objective.evaluation.model_validate(known[0])
    if when == "before" and start.evaluation and start.evaluation_key == evaluation_key(training.request):
        result = objective.evaluation.model_validate(start.evaluation)
    else:
        model, loss_function, ranks = training.model, training.loss_function, training.ranks
        sequences = objective.profile.evaluation.sequences
        result = evaluate_model(model, loss_function, training.val_data, objective, ranks, sequences=sequences)
    step = training.stage.start_step if when == "before" else training.stage.end_step
    metrics.append({"kind": "evaluation", "step": step, "when": when, **result.model_dump()})
    emit("evaluation", stage=training.stage.name, step=step, when=when, **result.model_dump())
    return result


def evaluation_key(request: StageRequest) -> str:
    """Return a digest of everything a validation loss depends on beside the weights."""
    profile = request.profile
    later = profile.batch.model_dump(include={"documents", "too_long", "target_length"}, exclude_defaults=True)
    return settings_digest(
        {
            **later,  # absent from older keys
            "dataset_id": request.dataset_id,
            "sequences": profile.evaluation.sequences,
            "sequence_length": profile.batch.sequence_length,
            "precision": profile.precision.model_dump(mode="json"),
        }
    )


def evaluate_checkpoint(request: EvaluationRequest, emit: Emit) -> None:
    """Score a checkpoint through plain `from_pretrained`, as any user of it would load it, and sample from it.

    Several ranks share the model, and each reads its rows of the files; the scores are the same up to rounding.
    """
    profile = request.profile
    objective = objective_of(profile)
    configure_torch(profile)
    with process_group(profile.launch.device) as ranks:
        ranks = dataclasses.replace(ranks, sharded=ranks.world_size > 1)
        dataset = objective.open_data(request.dataset_directory, "val")
        if ranks.sharded:
            model = objective.load_skeleton(request.checkpoint_directory).eval().requires_grad_(False)
            rows_of = rows_of_checkpoint(request.checkpoint_directory, model)
            hold_as_computed(model, profile.precision)
            shard_model(model, rows_of, ranks)
            with autocast(profile.precision, ranks.device):
                loss_function = objective.loss_function(model, dataset.manifest)
        else:
            model = objective.load_model(request.checkpoint_directory)
            loss_function = objective.loss_function(model, dataset.manifest)
            hold_as_computed(model, profile.precision)
            model.to(ranks.device)
        evaluation = evaluate_model(model, loss_function, dataset, objective, ranks, sequences=request.sequences)
        with autocast(profile.precision, ranks.device):
            samples = objective.sample(model, request.checkpoint_directory, dataset.manifest, ranks)
        if ranks.is_first:
            request.result_path.write_text(json.dumps({**evaluation.model_dump(), "samples": samples}))
            emit("evaluation", **evaluation.model_dump())


if __name__ == "__main__":
    serve_request(EvaluationRequest, evaluate_checkpoint)
