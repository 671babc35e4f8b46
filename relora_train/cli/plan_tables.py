"""A plan as tables of text, for whoever prints them. Light: imports no torch, boto3 or prefect."""

from __future__ import annotations

from relora_train.runs.plan import CheckpointSize, PhaseCost, Plan, PlannedStage
from relora_train.settings.base import FrozenConfig
from relora_train.text import short_count, size

_PHASE_ROWS = (
    "trained parameters",
    "FLOPs a token",
    "memory: weights",
    "memory: gradients",
    "memory: optimizer",
    "memory: merged weights",
    "memory, without activations",
    "snapshot",
)


class Section(FrozenConfig):
    """A table for people: a title, its columns and its rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sections(plan: Plan) -> tuple[Section, ...]:
    """The plan as tables. Sizes are decimal: 1 GB is 10^9 bytes."""
    run = [
        ("profile", plan.profile),
        ("method", plan.method),
        ("data", plan.data_source),
        ("steps", f"{plan.total_steps:,}"),
        ("tokens", f"{short_count(plan.total_tokens)} ({plan.tokens_per_step:,} a step)"),
        ("parameters", plan.unknown if plan.parameters is None else short_count(plan.parameters)),
    ]
    if plan.total_flops and plan.full_rank_flops:
        share = plan.total_flops / plan.full_rank_flops
        run.append(("FLOPs", f"{plan.total_flops:.3g} ({share:.0%} of full rank)"))
    if plan.disk_bytes:
        run.append(("disk", f"{size(plan.disk_bytes)} for all checkpoints and the snapshots beside them"))
    stages = tuple(_stage_row(stage) for stage in plan.stages)
    columns = ("stage", "steps", "tokens", "learning rate", "FLOPs", "model", "optimizer", "adapter")
    tables = [
        Section(title="Run", columns=("", ""), rows=tuple((name, str(value)) for name, value in run)),
        Section(title="Stages, and the files of each checkpoint", columns=columns, rows=stages),
    ]
    phases = {name: cost for name, cost in (("full rank", plan.full), ("low rank", plan.low_rank)) if cost}
    if phases:
        rows = zip(*(_phase_column(cost, plan.parameters or 1) for cost in phases.values()), strict=True)
        labelled = tuple((label, *cells) for label, cells in zip(_PHASE_ROWS, rows, strict=True))
        tables.append(Section(title="Cost", columns=("", *phases), rows=labelled))
    if plan.low_rank and plan.low_rank.orders:
        orders = tuple(
            (", ".join(name.rpartition(".")[2] for name in each.layers), each.order, f"{each.flops_per_token:.3g}")
            for each in plan.low_rank.orders
        )
        heads = ("low-rank layers of a block", "order of products", "FLOPs a token")
        tables.append(Section(title="Products", columns=heads, rows=orders))
    return tuple(tables)


def _phase_column(cost: PhaseCost, parameters: int) -> tuple[str, ...]:
    memory = cost.memory
    trained = f"{short_count(cost.trainable_parameters)} ({cost.trainable_parameters / parameters:.0%})"
    sizes = (memory.weights, memory.gradients, memory.optimizer, memory.merged, memory.total)
    return (trained, f"{cost.flops_per_token:.3g}", *map(size, (*sizes, cost.snapshot_bytes)))


def _stage_row(stage: PlannedStage) -> tuple[str, ...]:
    return (
        stage.name,
        f"{stage.start_step + 1:,} to {stage.end_step:,}",
        short_count(stage.tokens),
        " → ".join(f"{point.learning_rate:.2g}" for point in stage.learning_rates),
        "?" if stage.flops is None else f"{stage.flops:.3g}",
        *_checkpoint_cells(stage.checkpoint),
    )


def _checkpoint_cells(checkpoint: CheckpointSize | None) -> tuple[str, ...]:
    if checkpoint is None:
        return ("?",) * 3
    return tuple(size(part) if part else "–" for part in (checkpoint.model, checkpoint.optimizer, checkpoint.adapter))
