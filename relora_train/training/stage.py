"""One stage's model, optimizer and data, and one optimizer update. The loop around it is trainer.py."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relora_train.checkpoints.manifest import DatasetManifest, Dtype
from relora_train.data.dataset import ExampleDataset
from relora_train.distributed import Ranks, whole
from relora_train.errors import ConfigError
from relora_train.method.bfloat16_adamw import BFloat16AdamW, round_trained_matrices
from relora_train.method.fast_path import share_inputs
from relora_train.method.layer import relora_layers
from relora_train.method.merge import reinit
from relora_train.method.products import Products
from relora_train.method.stages import Stage, stage_learning_rate
from relora_train.method.wrap import apply_relora
from relora_train.settings.profile import Profile
from relora_train.training.evaluate import autocast
from relora_train.training.files import (
    OPTIMIZER_FILE,
    LazyMapping,
    SavedOptimizerState,
    TrainingState,
    read_tensor,
    read_training_state,
)
from relora_train.training.models.base import LossFunction, Objective
from relora_train.training.models.compiling import compile_blocks
from relora_train.training.models.model import checkpoint_activations
from relora_train.training.models.pretrained import dtype_of_files
from relora_train.training.models.registry import objective_of
from relora_train.training.optimizer import build_optimizer, load_optimizer_state_by_name
from relora_train.training.precision import MatmulPrecision
from relora_train.training.prefetch import Prefetcher
from relora_train.training.requests import StageRequest
from relora_train.training.sharding import RowsOf, rows_of_checkpoint, rows_of_first_rank, shard_model


@dataclass
class StageTraining:
    """Everything one rank holds during a stage."""

    request: StageRequest
    stage: Stage
    ranks: Ranks
    objective: Objective
    model: nn.Module
    loss_function: LossFunction
    """The model's."""

    optimizer: torch.optim.AdamW
    train_data: ExampleDataset
    batches: Prefetcher
    """Of train_data."""

    val_data: ExampleDataset
    start: TrainingState
    """Where the stage starts: the parent's end, or the beginning."""

    masters: MasterWeights | None
    """Exact frozen weights, when the device holds rounded ones."""

    products: Mapping[str, Products]
    """How each low-rank layer multiplies, by module name; empty where all follow the reference."""

    merged_adapter: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    """The A and B that the merge of this stage consumed, and their PEFT configuration."""

    checked_learning: bool = False
    """True once this process has asked if every low-rank layer learns."""

    matmul: MatmulPrecision | None = None
    """What matmul_precision 'auto' stands for."""

    source_dtype: Dtype | None = None
    """As in the manifest."""

    @property
    def profile(self) -> Profile:
        return self.request.profile

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def learning_rate(self, step: int) -> float:
        """Of update `step`, counted from 1."""
        return stage_learning_rate(self.profile, self.stage, step)

    def samples_seen(self, step: int) -> int:
        """Data position after update `step`."""
        return self.start.samples_seen + (step - self.start.step) * self.profile.batch.sequences

    def tokens_seen(self, step: int) -> int:
        """Tokens trained on after update `step`."""
        return self.start.tokens_seen + (step - self.start.step) * self.profile.batch.tokens

    def forward_backward(self, examples: Tensor, step: int) -> Tensor:
        """Add the gradients of this rank's share of update `step`'s batch; its share of the loss, on the device."""
        batch, rank = self.profile.batch, self.ranks
        terms = self.objective.terms(batch.sequences)
        total = torch.zeros((), device=rank.device)
        for micro_step, part in enumerate(torch.split(examples, batch.micro_sequences or len(examples))):
            torch.manual_seed(_draw_seed(self.profile.seed, step, micro_step, rank.rank))
            with autocast(self.profile.precision, rank.device):
                loss = self.loss_function.loss(part) / terms
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def update(self, step: int) -> tuple[Tensor, Tensor]:
        """Do update `step` and return its mean loss in nats per term and the gradient norm before clipping.

        Both stay on the device, and nothing here waits for it. A function of the weights, the optimizer state and
        `step` alone: batch and dropout follow from the profile's seed.
        """
        rank = self.ranks
        examples = self.batches.batch(self.samples_seen(step - 1), last=step == self.stage.end_step)
        total = self.forward_backward(examples, step)
        rank.sum_gradients(self.trainable)
        norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if isinstance(self.optimizer, BFloat16AdamW):
            self.optimizer.seed_rounding(_draw_seed(self.profile.seed, step, -1, 0))
        self.optimizer.step()
        return rank.sum(total), norm

    def _clip(self) -> Tensor:
        limit = self.profile.optimizer.max_grad_norm
        return whole(nn.utils.clip_grad_norm_(self.trainable, limit if limit is not None else float("inf")))


def _draw_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of one forward pass's dropout: different for every rank and micro-step, and needing no saved state.

    Micro-step -1 is the optimizer's, the same on all ranks.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class MasterWeights(MutableMapping[str, Tensor]):
    """float32 weights by name: the parent checkpoint's until overwritten, read from disk one at a time.

    One that is overwritten goes to the disk too: all merged ones together are as large as the model. Its file in
    `scratch` has no name any more, so nothing of it outlives the process.
    """

    def __init__(self, names: list[str], read: Callable[[str], Tensor], scratch: Path) -> None:
        self._names, self._read = set(names), read
        self._scratch = scratch if scratch.is_dir() else None  # on a machine beside the flow's: the system's own
        self._written: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._written[name] if name in self._written else self._read(name)

    def __setitem__(self, name: str, value: Tensor) -> None:
        value = value.detach().cpu().contiguous()
        if not value.numel():  # a rank without a row of it: an empty file cannot be mapped
            self._written[name] = value
            return
        with tempfile.NamedTemporaryFile(dir=self._scratch) as file:
            file.write(value.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=False, size=value.numel(), dtype=value.dtype)
        self._written[name] = mapped.view(value.shape)

    def __delitem__(self, name: str) -> None:
        raise TypeError("a master weight cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def prepare_stage(request: StageRequest, ranks: Ranks) -> StageTraining:
    """Load the parent, or build the model, and wrap it as the stage asks. Every rank holds the same, or its rows."""
    profile, stage = request.profile, request.stage
    objective = objective_of(profile)
    if fault := profile.fault_of_ranks(ranks.world_size):
        raise ConfigError(f"{fault}.")
    train_data = objective.open_data(request.dataset_directory, "train")
    val_data = objective.open_data(request.dataset_directory, "val")
    train_data.require(profile.batch.sequences)
    val_data.require(1)
    start = _start(request)
    build = _sharded_model if ranks.sharded else _whole_model
    model, masters = build(request, objective, train_data.manifest, ranks)
    objective.prepare_for_training(model)
    loss_function = objective.loss_function(model, train_data.manifest)
    if profile.precision.trains_in_bfloat16:
        round_trained_matrices(model)
    model.to(ranks.device).train()
    if profile.launch.gradient_checkpointing:
        checkpoint_activations(model)
    optimizer = _optimizer(request, stage, model)
    products: dict[str, Products] = {}
    if profile.launch.compile:
        compile_blocks(model)
    elif stage.low_rank:
        # A block's weights are whole on a rank only while it computes: kept merged ones would be all the model again.
        products = share_inputs(model, optimizer=None if ranks.sharded else optimizer)
    batches = Prefetcher(train_data, sequences=profile.batch.sequences, ranks=ranks)
    training = StageTraining(
        request=request,
        stage=stage,
        ranks=ranks,
        objective=objective,
        model=model,
        loss_function=loss_function,
        optimizer=optimizer,
        train_data=train_data,
        batches=batches,
        val_data=val_data,
        start=start,
        masters=masters,
        products=products,
        source_dtype=request.source_dtype,
    )
    if request.parent_directory is None and profile.model.pretrained is not None:
        training.source_dtype = dtype_of_files(profile.model.pretrained, revision=profile.model.revision)
    return training


def _whole_model(
    request: StageRequest, objective: Objective, manifest: DatasetManifest, ranks: Ranks
) -> tuple[nn.Module, MasterWeights | None]:
    """On the CPU, and the exact weights of those held rounded."""
    parent, masters = request.parent_directory, None
    model = objective.load_model(parent) if parent is not None else objective.build_model(manifest)
    objective.check_fits(model, manifest)
    if request.stage.low_rank:
        _wrap(model, request)
        if request.profile.precision.computes_in_bfloat16:
            masters = _round_frozen_weights(model, parent, request.output_directory.parent)
    return model, masters


def _sharded_model(
    request: StageRequest, objective: Objective, manifest: DatasetManifest, ranks: Ranks
) -> tuple[nn.Module, MasterWeights | None]:
    """This rank's rows of the same, on its device: read from the parent's files, or made by the first rank."""
    profile, parent = request.profile, request.parent_directory
    if parent is not None:
        model = objective.load_skeleton(parent)
        rows_of = rows_of_checkpoint(parent, model)
    else:
        model = objective.model_skeleton(manifest)
        rows_of = rows_of_first_rank(objective.build_model(manifest) if ranks.is_first else None, ranks)
    objective.check_fits(model, manifest)
    rounded: list[str] = []
    if request.stage.low_rank:
        _wrap(model, request)
        if profile.precision.computes_in_bfloat16:
            for name, layer in relora_layers(model):
                layer.weight.data = layer.weight.data.to(torch.bfloat16)
                rounded.append(f"{name}.weight")
    exact = shard_model(model, rows_of, ranks, keep=() if parent is not None else rounded)
    if request.stage.low_rank:
        reinit(model, seed=profile.seed, cycle=request.stage.cycle)
    scratch = request.output_directory.parent
    return model, _sharded_masters(model, rounded, exact, rows_of, scratch) if rounded else None


def _sharded_masters(
    model: nn.Module, rounded: list[str], exact: dict[str, Tensor], rows_of: RowsOf, scratch: Path
) -> MasterWeights:
    parameters = dict(model.named_parameters())
    return MasterWeights(rounded, lambda name: exact[name] if exact else rows_of((name,), parameters[name]), scratch)


def _wrap(model: nn.Module, request: StageRequest) -> None:
    relora = request.profile.relora
    apply_relora(
        model,
        rank=relora.rank,
        alpha=relora.alpha,
        dropout=relora.dropout,
        target_modules=relora.target_modules,
        rank_stabilized=relora.rank_stabilized,
        seed=request.profile.seed,
        cycle=request.stage.cycle,
    )


def _start(request: StageRequest) -> TrainingState:
    """The parent's state; on another dataset the data position starts again."""
    profile, dataset_id = request.profile, request.dataset_id
    schedule = profile.schedule.model_dump(mode="json")
    update = {"dataset_id": dataset_id, "seed": profile.seed, "schedule": schedule}
    if request.parent_directory is None:
        return TrainingState(step=0, cycle=0, stage_kind="", tokens_seen=0, samples_seen=0, **update)
    parent = read_training_state(request.parent_directory)
    if parent.dataset_id != dataset_id:
        update["samples_seen"] = 0
    return parent.model_copy(update=update)


def _round_frozen_weights(model: nn.Module, parent: Path | None, scratch: Path) -> MasterWeights:
    """Hold the wrapped weights in bfloat16; the exact ones stay in the parent's files, or else in memory."""
    in_memory: dict[str, Tensor] = {}
    names = []
    for module, layer in relora_layers(model):
        name = f"{module}.weight"
        names.append(name)
        if parent is None or read_tensor(parent, name, rows=slice(0, 0)) is None:  # asks only whether it is there
            in_memory[name] = layer.weight.detach().clone()
        layer.weight.data = layer.weight.data.to(torch.bfloat16)

    def read(name: str) -> Tensor:
        if name in in_memory:
            return in_memory[name]
        tensor = read_tensor(parent, name) if parent is not None else None
        if tensor is None:
            raise KeyError(name)
        return tensor

    return MasterWeights(names, read, scratch)


def _optimizer(request: StageRequest, stage: Stage, model: nn.Module) -> torch.optim.AdamW:
    """AdamW, with the parent's state where the parent is an earlier stage of the same phase.

    The first cycle after a warm start begins with a fresh optimizer and its own warm-up, as in the paper's code.
    """
    settings = request.profile.optimizer
    optimizer = build_optimizer(
        model,
        learning_rate=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    if request.parent_directory is None or read_training_state(request.parent_directory).stage_kind != stage.kind:
        return optimizer
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = SavedOptimizerState(request.parent_directory / OPTIMIZER_FILE)
    usable = [name for name in state if shapes.get(name) == state.shape_of(name)]
    load_optimizer_state_by_name(optimizer, model, LazyMapping(usable, state.__getitem__))
    return optimizer
