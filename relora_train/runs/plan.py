"""Count what a run will take, before anything starts: stages, tokens, parameters, FLOPs, memory, disk, rates.

Everything is counted from the profile, nothing is measured, and no network is needed.
"""

from relora_train.method.schedule import learning_rate
from relora_train.method.stages import Stage, plan_stages
from relora_train.runs.costs import CardFit, PhaseCost, card_fits, full_cost, low_rank_cost
from relora_train.runs.tokenization import TokenizationEstimate, estimate_tokenization
from relora_train.settings.base import FrozenConfig
from relora_train.settings.data import DataConfig
from relora_train.settings.profile import Profile
from relora_train.training.models.activations import evaluation_bytes
from relora_train.training.models.registry import counted_shape
from relora_train.training.models.shape import ShapeUnknownError

_FP32_BYTES = 4
_SNAPSHOTS_KEPT = 2


class CheckpointSize(FrozenConfig):
    """Bytes of a checkpoint's large files; all are fp32."""

    model: int
    optimizer: int
    """The optimizer's state after the reset; an embedding row that no token met takes less."""

    adapter: int

    @property
    def total(self) -> int:
        return self.model + self.optimizer + self.adapter


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
    rough: bool = False
    """True if activations are a guess: weights, gradients and optimizer are counted for any model."""

    full: PhaseCost | None = None
    """Full rank: the warm start, the whole run of method 'full', and what the rest is compared with."""

    low_rank: PhaseCost | None = None
    """The cycles; None for method 'full'."""

    fits: tuple[CardFit, ...] = ()
    """Empty for a run on the CPU."""

    evaluation_bytes: int | None = None
    """Bytes on the device that scores a checkpoint."""

    total_flops: int | None = None
    full_rank_flops: int | None = None
    """The same tokens at full rank throughout."""

    disk_bytes: int | None = None
    """All checkpoints of the run and the snapshots that exist beside them; not the dataset."""

    tokenization: TokenizationEstimate | None = None
    """None where the size of the text is not known beforehand."""


def plan(profile: Profile) -> Plan:
    """Count a run. Raise ConfigError or NoTargetModulesError if the profile does not fit its model's layers."""
    stages = plan_stages(profile)
    full: PhaseCost | None = None
    low_rank: PhaseCost | None = None
    unknown = parameters = evaluation = None
    rough = False
    fits: tuple[CardFit, ...] = ()
    try:
        shape = counted_shape(profile)
        low_rank = None if profile.method == "full" else low_rank_cost(profile, shape)
        full = full_cost(profile, shape)
        fits = card_fits(profile, shape, {stage.low_rank for stage in stages})
        rough = shape.rough
        parameters, evaluation = shape.parameters, evaluation_bytes(profile, shape)
    except ShapeUnknownError as error:
        unknown = str(error)
    costs = [low_rank if stage.low_rank else full for stage in stages]
    tokens = profile.batch.tokens
    planned = tuple(
        PlannedStage(
            name=stage.name,
            kind=stage.kind,
            start_step=stage.start_step,
            end_step=stage.end_step,
            tokens=stage.steps * tokens,
            learning_rates=_milestones(profile, stage),
            flops=cost.flops_per_token * stage.steps * tokens if cost else None,
            checkpoint=_checkpoint_size(profile, stage, cost, parameters) if cost and parameters else None,
        )
        for stage, cost in zip(stages, costs, strict=True)
    )
    disk_bytes = _total([stage.checkpoint.total if stage.checkpoint else None for stage in planned])
    if disk_bytes is not None:  # snapshots of one stage at a time
        disk_bytes += _SNAPSHOTS_KEPT * max((cost.snapshot_bytes for cost in costs if cost), default=0)
    total_tokens, data = profile.schedule.total_steps * tokens, profile.data
    return Plan(
        profile=profile.name,
        method=profile.method,
        data_source=source_shown(data),
        tokens_per_step=tokens,
        total_steps=profile.schedule.total_steps,
        total_tokens=total_tokens,
        stages=planned,
        unknown=unknown,
        parameters=parameters,
        rough=rough,
        full=full,
        low_rank=low_rank,
        fits=fits,
        evaluation_bytes=evaluation,
        total_flops=_total([stage.flops for stage in planned]),
        full_rank_flops=full.flops_per_token * total_tokens if full else None,
        disk_bytes=disk_bytes,
        tokenization=estimate_tokenization(data),
    )


def source_shown(data: DataConfig) -> str:
    """Return a source's kind and places, or each of several with its name and its share of the tokens."""
    if data.sources:
        each = zip(data.shares.items(), data.parts(), strict=True)
        return "; ".join(f"{name} {float(share):.1%}: {source_shown(part)}" for (name, share), part in each)
    places = (data.hub_id, data.hub_config, data.hub_split) if data.source == "hub" else data.packages or data.paths
    return " ".join(part for part in (data.source, *places) if part)


def _milestones(profile: Profile, stage: Stage) -> tuple[LearningRatePoint, ...]:
    schedule = profile.schedule
    starts_a_phase = stage.start_step == 0 or (stage.low_rank and stage.start_step == schedule.warm_start_steps)
    climb = schedule.warmup_steps if starts_a_phase else schedule.restart_warmup_steps
    restarts = stage.kind == "relora" and schedule.jagged
    top = stage.start_step + (climb if starts_a_phase or restarts else 0)
    steps = sorted({stage.start_step + 1, min(top + 1, stage.end_step), stage.end_step})
    return tuple(LearningRatePoint(step=step, learning_rate=learning_rate(profile, stage, step)) for step in steps)


def _checkpoint_size(profile: Profile, stage: Stage, cost: PhaseCost, parameters: int) -> CheckpointSize:
    """Return a checkpoint's size. Only cycles and full-rank stages hand their optimizer on."""
    reset = profile.optimizer_reset
    mode = "zero" if profile.optimizer.low_rank_state == "factored" and reset.mode != "none" else reset.mode
    kept = {"none": 1.0, "zero": 0.0}.get(mode, 1 - reset.ratio)
    # An entry of a moment of A or B that was kept: index and value, or all entries if that is cheaper.
    kept_bytes = float(_FP32_BYTES) if kept > 0.5 else 2 * _FP32_BYTES * kept
    optimizer = round(_FP32_BYTES * cost.state_of_others + kept_bytes * cost.state_of_factors)
    return CheckpointSize(
        model=_FP32_BYTES * parameters,
        optimizer=optimizer if stage.kind in ("relora", "full") else 0,
        adapter=_FP32_BYTES * cost.adapter_parameters,
    )


def _total(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
