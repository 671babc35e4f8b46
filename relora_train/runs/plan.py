"""Count what a run will take, before anything starts: stages, tokens, parameters, FLOPs, memory, disk, rates.

Everything is counted from the profile, nothing is measured, and no network is needed.
"""

from __future__ import annotations

import math

from relora_train.method.products import Products, choose_products, flops_per_token, sibling_groups
from relora_train.method.schedule import learning_rate
from relora_train.method.stages import Stage, plan_stages
from relora_train.settings.base import FrozenConfig
from relora_train.settings.method import OptimizerResetConfig
from relora_train.settings.profile import Profile
from relora_train.settings.running import LaunchConfig
from relora_train.training.models.registry import facts_of, model_shape
from relora_train.training.models.shape import (
    LinearShape,
    ModelShape,
    ShapeUnknownError,
    model_flops_per_token,
    wrapped_layers,
)

_FP32_BYTES = 4
_BF16_BYTES = 2
_MOMENTS = 2
_SNAPSHOTS_KEPT = 2


class MemoryEstimate(FrozenConfig):
    """Bytes on every device for as long as a stage lasts. Not covered: activations, which grow with the micro-batch."""

    weights: int
    gradients: int
    optimizer: int
    merged: int = 0
    """Merged weights that are kept for the length of an update, where that is the faster order."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.merged

    def shared_by(self, launch: LaunchConfig) -> MemoryEstimate:
        """Return each device's part when ranks share the model. Not covered: the blocks gathered for a moment."""
        ranks = (launch.world_size or 1) if launch.sharding == "full" else 1
        return MemoryEstimate(**{name: math.ceil(size / ranks) for name, size in self})


class CheckpointSize(FrozenConfig):
    """Bytes of a checkpoint's large files; all are fp32."""

    model: int
    optimizer: int
    """The optimizer's state after the reset; an embedding row that no token met takes less."""

    adapter: int

    @property
    def total(self) -> int:
        return self.model + self.optimizer + self.adapter


class LayerOrder(FrozenConfig):
    """How low-rank layers that read one input multiply; see method/products.py."""

    layers: tuple[str, ...]
    """Names in one block."""

    order: str
    flops_per_token: int


class PhaseCost(FrozenConfig):
    """The cost of full-rank or low-rank training, whichever stage does it."""

    trainable_parameters: int
    adapter_parameters: int
    """The part of them in A and B."""

    flops_per_token: int
    """Forward and backward, in the cheapest order of products."""

    memory: MemoryEstimate
    snapshot_bytes: int
    """One snapshot inside a stage: all that moves, and its Adam state."""

    orders: tuple[LayerOrder, ...] = ()
    """The low-rank layers of a block, on the kind of device that the profile names; 'auto' counts as a CPU."""


class LearningRatePoint(FrozenConfig):
    """The learning rate of one update. Updates count from 1."""

    step: int
    learning_rate: float


class PlannedStage(FrozenConfig):
    """Updates start_step + 1 to end_step."""

    name: str
    kind: str
    start_step: int
    end_step: int
    tokens: int
    learning_rates: tuple[LearningRatePoint, ...]
    """The rates at the first update, at the top of the climb if there is one, and at the last update."""

    flops: int | None
    checkpoint: CheckpointSize | None


class Plan(FrozenConfig):
    """A run as it will be. Numbers that need the model's shape are None when `unknown` says why."""

    profile: str
    method: str
    data_source: str
    """The source of the text."""

    tokens_per_step: int
    total_steps: int
    total_tokens: int
    stages: tuple[PlannedStage, ...]
    unknown: str | None = None
    parameters: int | None = None
    full: PhaseCost | None = None
    """Full rank: the warm start, the whole run of method 'full', and what the rest is compared with."""

    low_rank: PhaseCost | None = None
    """The cycles; None for method 'full'."""

    total_flops: int | None = None
    full_rank_flops: int | None = None
    """The same tokens at full rank throughout."""

    disk_bytes: int | None = None
    """All checkpoints of the run and the snapshots that exist beside them; not the dataset."""


def plan(profile: Profile) -> Plan:
    """Count a run. Raise ConfigError or NoTargetModulesError if the profile does not fit its model's layers."""
    stages = plan_stages(profile)
    full: PhaseCost | None = None
    low_rank: PhaseCost | None = None
    unknown = parameters = None
    try:
        shape = model_shape(profile)
        low_rank = None if profile.method == "full" else _low_rank_cost(profile, shape)
        parameters, full = shape.parameters, _full_cost(profile, shape)
    except ShapeUnknownError as error:
        unknown = str(error)
    costs = [low_rank if stage.low_rank else full for stage in stages]
    planned = tuple(
        PlannedStage(
            name=stage.name,
            kind=stage.kind,
            start_step=stage.start_step,
            end_step=stage.end_step,
            tokens=stage.steps * profile.batch.tokens,
            learning_rates=_milestones(profile, stage),
            flops=cost.flops_per_token * stage.steps * profile.batch.tokens if cost else None,
            checkpoint=_checkpoint_size(profile, stage, cost, parameters) if cost and parameters else None,
        )
        for stage, cost in zip(stages, costs, strict=True)
    )
    total_tokens, data = profile.schedule.total_steps * profile.batch.tokens, profile.data
    places = (data.hub_id, data.hub_config, data.hub_split) if data.source == "hub" else data.paths
    return Plan(
        profile=profile.name,
        method=profile.method,
        data_source=" ".join(part for part in (data.source, *places) if part),
        tokens_per_step=profile.batch.tokens,
        total_steps=profile.schedule.total_steps,
        total_tokens=total_tokens,
        stages=planned,
        unknown=unknown,
        parameters=parameters,
        full=full,
        low_rank=low_rank,
        total_flops=_total([stage.flops for stage in planned]),
        full_rank_flops=full.flops_per_token * total_tokens if full else None,
        disk_bytes=_disk_bytes(planned, costs),
    )


def _milestones(profile: Profile, stage: Stage) -> tuple[LearningRatePoint, ...]:
    schedule = profile.schedule
    starts_a_phase = stage.start_step == 0 or (stage.low_rank and stage.start_step == schedule.warm_start_steps)
    climb = schedule.warmup_steps if starts_a_phase else schedule.restart_warmup_steps
    restarts = stage.kind == "relora" and schedule.jagged
    top = stage.start_step + (climb if starts_a_phase or restarts else 0)
    steps = sorted({stage.start_step + 1, min(top + 1, stage.end_step), stage.end_step})
    return tuple(LearningRatePoint(step=step, learning_rate=learning_rate(profile, stage, step)) for step in steps)


def _full_cost(profile: Profile, shape: ModelShape) -> PhaseCost:
    parameters = _trained_bytes(profile, shape, shape.parameters)
    return PhaseCost(
        trainable_parameters=shape.parameters,
        adapter_parameters=0,
        flops_per_token=model_flops_per_token(shape, sequence_length=profile.batch.sequence_length),
        memory=MemoryEstimate(weights=parameters, gradients=parameters, optimizer=_MOMENTS * parameters).shared_by(
            profile.launch
        ),
        snapshot_bytes=(1 + _MOMENTS) * parameters,
    )


def _low_rank_cost(profile: Profile, shape: ModelShape) -> PhaseCost:
    relora, batch = profile.relora, profile.batch
    wrapped = wrapped_layers(shape, target_modules=relora.target_modules, rank=relora.rank)
    frozen = shape.layers * sum(linear.weights for linear in wrapped)
    factors = shape.layers * relora.rank * sum(linear.sides for linear in wrapped)
    trainable = shape.parameters - frozen + factors
    frozen_bytes = _BF16_BYTES if profile.precision.computes_in_bfloat16 else _FP32_BYTES
    trained = _trained_bytes(profile, shape, trainable)
    by_name = {linear.name: linear for linear in wrapped}
    siblings = [tuple(by_name[name] for name in names) for names in sibling_groups(list(by_name))]
    orders = {layers: _products(profile, layers) for layers in siblings}
    flops = model_flops_per_token(
        shape,
        sequence_length=batch.sequence_length,
        wrapped={layers: count for layers, (_, count) in orders.items()},
    )
    merged = sum(linear.weights for layers, (how, _) in orders.items() if how != "split" for linear in layers)
    return PhaseCost(
        trainable_parameters=trainable,
        adapter_parameters=factors,
        flops_per_token=flops,
        memory=MemoryEstimate(
            weights=frozen_bytes * frozen + trained,
            gradients=trained,
            optimizer=_MOMENTS * trained,
            merged=_FP32_BYTES * shape.layers * merged,
        ).shared_by(profile.launch),
        snapshot_bytes=(1 + _MOMENTS) * trained,
        orders=tuple(
            LayerOrder(layers=tuple(linear.name for linear in layers), order=how, flops_per_token=round(count))
            for layers, (how, count) in orders.items()
        ),
    )


def _trained_bytes(profile: Profile, shape: ModelShape, parameters: int) -> int:
    """Return the bytes of one copy of what is trained, such as its gradients. Under autocast all stays fp32."""
    if not profile.precision.trains_in_bfloat16:
        return _FP32_BYTES * parameters
    vectors = shape.vector_parameters
    return _BF16_BYTES * (parameters - vectors) + _FP32_BYTES * vectors


def _products(profile: Profile, layers: tuple[LinearShape, ...]) -> tuple[Products, float]:
    """Return what fast_path.share_inputs will choose, and its FLOPs a position."""
    launch, relora = profile.launch, profile.relora
    sharded = launch.sharding == "full" and launch.world_size != 1
    exact = relora.dropout == 0 and profile.precision.dtype == "float32"
    shape = layers[0].in_features, [linear.out_features for linear in layers], relora.rank
    device = "cuda" if launch.device == "cuda" else "cpu"
    how = choose_products(*shape, merges=exact and not sharded and not launch.compiles_on(device), device=device)
    sequences, micro_steps = profile.batch.forward_passes(launch.world_size or 1)
    tokens = sequences * facts_of(profile).rows_per_sequence()
    return how, flops_per_token(how, *shape, tokens=tokens, micro_steps=micro_steps)


def _checkpoint_size(profile: Profile, stage: Stage, cost: PhaseCost, parameters: int) -> CheckpointSize:
    """Return a checkpoint's size. Only cycles and full-rank stages hand their optimizer on."""
    factors, others = cost.adapter_parameters, cost.trainable_parameters - cost.adapter_parameters
    moment = _FP32_BYTES * others + _kept_bytes(profile.optimizer_reset) * factors
    return CheckpointSize(
        model=_FP32_BYTES * parameters,
        optimizer=round(_MOMENTS * moment) if stage.kind in ("relora", "full") else 0,
        adapter=_FP32_BYTES * factors,
    )


def _kept_bytes(reset: OptimizerResetConfig) -> float:
    """Return the bytes on disk of one entry of a moment of A or B: index and value, or dense if that is cheaper."""
    kept = {"none": 1.0, "zero": 0.0}.get(reset.mode, 1 - reset.ratio)
    return float(_FP32_BYTES) if kept > 0.5 else 2 * _FP32_BYTES * kept


def _disk_bytes(stages: tuple[PlannedStage, ...], costs: list[PhaseCost | None]) -> int | None:
    """Return the bytes of all checkpoints and of the largest pair of snapshots at one time."""
    checkpoints = _total([stage.checkpoint.total if stage.checkpoint else None for stage in stages])
    snapshots = max((cost.snapshot_bytes for cost in costs if cost), default=0)
    return None if checkpoints is None else checkpoints + _SNAPSHOTS_KEPT * snapshots


def _total(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
