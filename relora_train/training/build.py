"""Build a stage: load the parent or make the model, wrap it, and give it optimizer and data."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.distributed import Ranks
from relora_train.errors import ConfigError
from relora_train.method.bfloat16_adamw import round_trained_matrices
from relora_train.method.experts import expert_layers, hold_experts
from relora_train.method.fast_path import HashMasks, share_inputs
from relora_train.method.frozen import KINDS, Frozen
from relora_train.method.layer import relora_layers
from relora_train.method.merge import reinit
from relora_train.method.products import Products
from relora_train.method.wrap import apply_relora, frozen_matrices
from relora_train.training.early_updates import EarlyUpdates
from relora_train.training.files import (
    OPTIMIZER_FILE,
    LazyMapping,
    MasterWeights,
    SavedOptimizerState,
    TrainingState,
    read_tensor,
    read_training_state,
    save_model,
)
from relora_train.training.gradient_sum import GradientSum
from relora_train.training.models.base import Objective
from relora_train.training.models.compiling import can_compile, compile_blocks, without_compiling
from relora_train.training.models.model import checkpoint_activations, round_residual
from relora_train.training.models.pretrained import dtype_of_files
from relora_train.training.models.registry import objective_of
from relora_train.training.optimizer import build_optimizer, load_optimizer_state_by_name, state_shapes
from relora_train.training.requests import StageRequest
from relora_train.training.sharding import rows_of_checkpoint, shard_model
from relora_train.training.step import Prefetcher, StageTraining

_LOGGER = logging.getLogger(__name__)


def prepare_stage(request: StageRequest, ranks: Ranks) -> StageTraining:
    """Load the parent, or build the model, and wrap it as the stage asks. Every rank holds the same, or its rows."""
    profile, stage, parent = request.profile, request.stage, request.parent_directory
    objective = objective_of(profile)
    if fault := profile.fault_of_ranks(ranks.world_size):
        raise ConfigError(f"{fault}.")
    train_data = objective.open_data(request.dataset_directory, "train")
    val_data = objective.open_data(request.dataset_directory, "val")
    train_data.require_batch(profile.batch.sequences)
    val_data.require(1)
    schedule = profile.schedule.model_dump(mode="json")
    facts = {"dataset_id": request.dataset_id, "seed": profile.seed, "schedule": schedule}
    if parent is None:
        start = TrainingState(step=0, cycle=0, stage_kind="", tokens_seen=0, samples_seen=0, **facts)
    else:
        start = read_training_state(parent)
        facts["samples_seen"] = start.samples_seen if start.dataset_id == request.dataset_id else 0
        start = start.model_copy(update=facts)
    compiles = _compiles(request, ranks)
    build = _sharded_model if ranks.sharded else _whole_model
    weights = parent or _first_weights(request, objective, train_data.manifest, ranks)
    model, masters = build(request, objective, train_data.manifest, ranks, compiles, weights)
    objective.prepare_for_training(model)
    with without_compiling():
        loss_function = objective.loss_function(model, train_data.manifest)
    kind = profile.precision.frozen_as
    if stage.low_rank and kind != "float32" and not ranks.sharded:
        scratch = request.output_directory.parent
        masters = round_frozen_weights(
            model,
            kind,
            weights,
            scratch,
            device=ranks.device,
            keeps=ranks.is_first,
            others=profile.precision.rounds_others,
        )
    if profile.precision.trains_in_bfloat16:
        round_trained_matrices(model)
    model.to(ranks.device).train()
    if profile.precision.residual == "bfloat16":
        round_residual(objective.stem(model))
    if profile.launch.gradient_checkpointing:
        checkpoint_activations(model)
    optimizer = build_optimizer(model, profile.optimizer)
    # The first cycle after a warm start begins with a fresh optimizer and its own warm-up, as in the paper's code.
    if parent is not None and start.stage_kind == stage.kind:
        shapes = state_shapes(optimizer, model)
        state = SavedOptimizerState(parent / OPTIMIZER_FILE)
        usable = [name for name in state if shapes.get(name) == state.shapes_of(name)]  # a branch may differ in kind
        load_optimizer_state_by_name(optimizer, model, LazyMapping(usable, state.__getitem__))
    products: dict[str, Products] = {}
    masks = None
    if stage.low_rank and request.dropout_mask == "hash" and profile.relora.dropout > 0:
        masks = HashMasks(model)
    if stage.low_rank and not compiles:
        # A block's weights are whole on a rank only while it computes: kept merged ones would be all the model again.
        products = share_inputs(model, optimizer=None if ranks.sharded else optimizer)
    source_dtype = request.source_dtype
    if parent is None and profile.model.pretrained is not None:
        source_dtype = dtype_of_files(profile.model.pretrained, revision=profile.model.revision)
    return StageTraining(
        request=request,
        stage=stage,
        ranks=ranks,
        objective=objective,
        model=model,
        loss_function=loss_function,
        optimizer=optimizer,
        train_data=train_data,
        batches=Prefetcher(train_data, sequences=profile.batch.sequences, ranks=ranks),
        val_data=val_data,
        start=start,
        masters=masters,
        masks=masks,
        gradient_sum=GradientSum((p for group in optimizer.param_groups for p in group["params"]), ranks),
        products=products,
        early_updates=EarlyUpdates(optimizer) if profile.optimizer.in_backward else None,
        source_dtype=source_dtype,
    )


def _compiles(request: StageRequest, ranks: Ranks) -> bool:
    """Return True if the stage's blocks are to be compiled. Raises DeviceError where they are to and cannot be.

    Masks of the stream are drawn by numpy, which no graph holds: a low-rank stage that uses them runs eagerly.
    """
    launch = request.profile.launch
    if not launch.compiles_on(ranks.device.type):
        return False
    if request.stage.low_rank and request.profile.relora.dropout > 0 and request.dropout_mask == "stream":
        _LOGGER.warning(
            "%s is not compiled: the run's dropout masks are of the kind 'stream', which only eager code can draw.",
            request.stage.name,
        )
        return False
    return can_compile(ranks.device, required=launch.compile is True)


def first_weights_directory(request: StageRequest) -> Path:
    """Return the place for the weights with which several ranks begin a run, as long as its first stage needs them."""
    return request.output_directory.with_name(f"{request.output_directory.name}-first-weights")


def _first_weights(request: StageRequest, objective: Objective, manifest: DatasetManifest, ranks: Ranks) -> Path | None:
    """Return a directory with the weights of a stage without a parent, which the first of several ranks makes.

    The ranks of a machine map its files: no other rank ever has a model of its own in memory. One process makes none.
    """
    if ranks.world_size == 1 and not ranks.sharded:
        return None
    directory = first_weights_directory(request)
    if ranks.is_first:
        shutil.rmtree(directory, ignore_errors=True)
        model = objective.build_model(manifest)
        save_model(model, directory, weights=model.state_dict())
    ranks.barrier()
    return directory


def _whole_model(
    request: StageRequest,
    objective: Objective,
    manifest: DatasetManifest,
    ranks: Ranks,
    compiles: bool,
    weights: Path | None,
) -> tuple[nn.Module, MasterWeights | None]:
    """Return the model, on the CPU. Its files are mapped, not read: ranks of one machine have them in memory once."""
    model = objective.load_model(weights) if weights is not None else objective.build_model(manifest)
    objective.check_fits(model, manifest)
    if request.stage.low_rank:
        _wrap(model, request)
    if compiles:
        compile_blocks(model, recompute=request.profile.launch.recompute_elementwise)
    return model, None


def _sharded_model(
    request: StageRequest,
    objective: Objective,
    manifest: DatasetManifest,
    ranks: Ranks,
    compiles: bool,
    weights: Path | None,
) -> tuple[nn.Module, MasterWeights | None]:
    """Return this rank's rows of the same, read from the files onto its device, and the exact ones of those rounded."""
    profile, weights = request.profile, cast(Path, weights)
    model = objective.load_skeleton(weights)
    rows_of = rows_of_checkpoint(weights, model)
    objective.check_fits(model, manifest)
    rounded: list[str] = []
    if request.stage.low_rank:
        _wrap(model, request)
        if profile.precision.frozen_as == "bfloat16":
            for name, layer in relora_layers(model):
                layer.weight.data = layer.weight.data.to(torch.bfloat16)
                rounded.append(f"{name}.weight")
    if compiles:
        # Before fully_shard: a block that is compiled after it runs eagerly, without a word.
        compile_blocks(model, recompute=profile.launch.recompute_elementwise)
    shard_model(model, rows_of, ranks, bfloat16=profile.precision.computes_in_bfloat16)
    if request.stage.low_rank:
        reinit(model, seed=profile.seed, cycle=request.stage.cycle)
    if not rounded:
        return model, None
    parameters = dict(model.named_parameters())
    return model, MasterWeights(
        rounded,
        lambda name: rows_of((name,), parameters[name]),
        request.output_directory.parent,
    )


def _wrap(model: nn.Module, request: StageRequest) -> None:
    relora = request.profile.relora
    apply_relora(
        model,
        rank=relora.rank,
        alpha=relora.alpha,
        dropout=relora.dropout,
        target_modules=relora.target_modules,
        rank_stabilized=relora.rank_stabilized,
        frozen=relora.frozen,
        seed=request.profile.seed,
        cycle=request.stage.cycle,
    )


def round_frozen_weights(
    model: nn.Module,
    kind: Frozen,
    files: Path | None,
    scratch: Path,
    *,
    device: torch.device,
    keeps: bool = True,
    others: bool = False,
) -> MasterWeights:
    """Hold the wrapped weights as this kind, and bring them to the device one at a time.

    The exact ones stay in the files, or else in memory. others: hold the matrices of frozen embeddings, heads and
    linear layers in bfloat16, as autocast rounds them for each product.
    """
    places: dict[str, str | Tensor] = {}

    def keep(names: Sequence[str], exact: Tensor) -> None:
        stored = (
            name for name in names if files is not None and read_tensor(files, name, rows=slice(0, 0)) is not None
        )
        place = next(stored, None) or exact.detach().clone()
        places.update(dict.fromkeys(names, place))

    for module, layer in relora_layers(model):
        keep([f"{module}.weight"], layer.weight)
        layer.hold(layer.weight.detach(), kind)
        layer.to(device)
    for name, _, owner in list(expert_layers(model)) if kind in KINDS.values() else ():
        exact = owner.get_parameter(name.rpartition(".")[2]).detach()
        places[name] = exact  # files hold them one by one
        hold_experts(model, name, exact, kind)
        owner.to(device)
    for names, matrix in frozen_matrices(model) if others else ():
        weight = matrix.get_parameter("weight")
        if weight.dtype == torch.float32:
            keep(names, weight)
            weight.data = weight.data.to(torch.bfloat16).to(device)
        if isinstance(matrix, nn.Embedding):  # the stream between the blocks stays in float32
            matrix.register_forward_hook(lambda module, inputs, output: output.float())

    def read(name: str) -> Tensor:
        place = places[name]
        return place if isinstance(place, Tensor) else cast(Tensor, read_tensor(cast(Path, files), place))

    return MasterWeights(places, read, scratch, keeps=keeps)
