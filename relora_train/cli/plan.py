"""`relora plan` and `relora profiles`."""

from collections.abc import Sequence
from functools import partial

from rich.table import Table

from relora_train.cli.options import AsJson, Model, ProfileName, Sets, answer, with_model
from relora_train.cli.output import BLANK, View, facts, table
from relora_train.runs.costs import CardFit, ParameterKind
from relora_train.runs.plan import Plan
from relora_train.runs.plan import plan as plan_profile
from relora_train.settings.load import list_profiles, load_profile
from relora_train.text import duration, short_count
from relora_train.text import size as size_text
from relora_train.training.models.registry import facts_of

_LARGE_SHARE, _LARGE_NUMBER = 1 / 3, 500_000_000
"""Parameters in embeddings and head from which on the plan says how to freeze them."""

size = partial(size_text, form=".3g")


def plan(profile: ProfileName, sets: Sets = None, model: Model = None, as_json: AsJson = False) -> None:
    """Show what a profile comes to before anything starts: stages, tokens, parameters, memory, FLOPs."""
    settings = load_profile(profile, with_model(sets, model))
    facts_of(settings).check_pretrained(planned=True)
    planned = plan_profile(settings)
    answer(as_json, planned, lambda: plan_view(planned))


def profiles(as_json: AsJson = False) -> None:
    """List the shipped profiles."""
    described = []
    for path in list_profiles():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        about = first.removeprefix("#").strip() if first.startswith("#") else ""
        described.append({"name": path.stem, "about": about, "path": str(path)})
    rows = ((each["name"], each["about"]) for each in described)
    answer(as_json, described, lambda: [table(("profile", "about"), rows, left=("about",))])


def plan_view(plan: Plan) -> View:
    """Return the plan as facts and tables. Sizes are decimal: 1 GB is 10^9 bytes."""
    run = {
        "profile": plan.profile,
        "method": plan.method,
        "data": plan.data_source,
        "steps": f"{plan.total_steps:,}",
        "tokens": f"{short_count(plan.total_tokens)} ({plan.tokens_per_step:,} a step)",
        "parameters": str(plan.unknown) if plan.parameters is None else short_count(plan.parameters),
    }
    if plan.total_flops and plan.full_rank_flops:
        run["FLOPs"] = f"{plan.total_flops:.3g} ({plan.total_flops / plan.full_rank_flops:.0%} of full rank)"
    if plan.disk_bytes:
        run["disk"] = f"{size(plan.disk_bytes)} for all checkpoints and the snapshots beside them"
    if estimate := plan.tokenization:
        hours = ", ".join(f"{duration(3600 * each)} by {n}" for n, each in estimate.hours_by_workers.items())
        told = f"{size(estimate.text_bytes)} of text; {hours} worker(s); up to {size(estimate.disk_bytes)} of disk"
        run["tokenizing"] = f"{told} (estimate, without transfers)"
    if plan.low_rank and (note := vocabulary_note(plan.low_rank.kinds)):
        run["note"] = note
    for fit in plan.fits:
        run[f"on {size(fit.card_bytes)}"] = _fit_text(fit)
    if plan.evaluation_bytes and plan.parameters:
        run["evaluation"] = f"{size(plan.evaluation_bytes)}; {size(4 * plan.parameters)} of host memory to load"
    columns = ("stage", "steps", "tokens", "learning rate", "FLOPs", "model", "optimizer", "adapter")
    title = "Stages, and the files of each checkpoint"
    rows: list[tuple[str, ...]] = []
    for stage in plan.stages:
        files = stage.checkpoint
        sizes = (files.model, files.optimizer, files.adapter) if files else ()
        rows.append(
            (
                stage.name,
                f"{stage.start_step + 1:,} to {stage.end_step:,}",
                short_count(stage.tokens),
                " → ".join(f"{point.learning_rate:.2g}" for point in stage.learning_rates),
                "?" if stage.flops is None else f"{stage.flops:.3g}",
                *((size(n) if n else "–" for n in sizes) if files else ("?",) * 3),
            )
        )
    stages = table(columns, rows, title=title, left=("learning rate",))
    parts: View = [facts(run), BLANK, stages]
    phases = {name: cost for name, cost in (("full rank", plan.full), ("low rank", plan.low_rank)) if cost}
    if phases:
        costs, parameters = list(phases.values()), plan.parameters or 1
        trained = [(cost.trainable_parameters, cost.trainable_parameters / parameters) for cost in costs]
        roughly = " (roughly)" if plan.rough else ""
        by_label = {
            "trained parameters": [f"{short_count(number)} ({share:.0%})" for number, share in trained],
            "FLOPs a token": [f"{cost.flops_per_token:.3g}" for cost in costs],
            "memory: weights": [size(cost.memory.weights) for cost in costs],
            "memory: gradients": [size(cost.memory.gradients) for cost in costs],
            "memory: optimizer": [size(cost.memory.optimizer) for cost in costs],
            "memory: merged weights": [size(cost.memory.merged) for cost in costs],
            f"memory: activations{roughly}": [size(cost.memory.activations) for cost in costs],
            "memory in all": [size(cost.memory.total) for cost in costs],
            "snapshot": [size(cost.snapshot_bytes) for cost in costs],
        }
        numbers = [(label, *shown) for label, shown in by_label.items()]
        parts += [BLANK, table(("", *phases), numbers, title="Cost")]
    if plan.low_rank:
        parts += [BLANK, _kinds_table(plan.low_rank.kinds)]
    if plan.low_rank and plan.low_rank.orders:
        orders = [
            (", ".join(name.rpartition(".")[2] for name in each.layers), each.order, f"{each.flops_per_token:.3g}")
            for each in plan.low_rank.orders
        ]
        heads = ("low-rank layers of a block", "order of products", "FLOPs a token")
        parts += [BLANK, table(heads, orders, title="Products", left=("order of products",))]
    return parts


def _kinds_table(kinds: Sequence[ParameterKind]) -> Table:
    """Return low-rank stages' parameters as a tree: frozen and trained, and the kinds below each."""
    rows = []
    for lot, trained in (("trained", True), ("frozen", False)):
        below = [kind for kind in kinds if kind.trained is trained]
        rows.append((lot, short_count(sum(kind.parameters for kind in below))))
        for kind in below:
            name = {"wrapped": "wrapped weights", "factors": "A and B"}.get(kind.name, f"relora.train.{kind.name}")
            rows.append((f"  {name}", short_count(kind.parameters)))
    return table(("parameters of low-rank stages", "number"), rows, title="Trained and frozen")


def vocabulary_note(kinds: Sequence[ParameterKind]) -> str | None:
    """Return a warning where the vocabulary's matrices are a large part of what low-rank stages train."""
    trained = {kind.name: kind.parameters for kind in kinds if kind.trained}
    ends = {name: trained[name] for name in ("embeddings", "head") if name in trained}
    number, share = sum(ends.values()), sum(ends.values()) / max(1, sum(trained.values()))
    if share <= _LARGE_SHARE and number <= _LARGE_NUMBER:
        return None
    switches = ", ".join(f"relora.train.{name}=false" for name in ends)
    what = f"{' and '.join(ends)} are {share:.0%} of what low-rank stages train ({short_count(number)})"
    return f"{what}; to freeze them: {switches}"


def _fit_text(fit: CardFit) -> str:
    sizes = [f"{n} ({name})" for name, n in (("full rank", fit.full), ("low rank", fit.low_rank)) if n]
    options = f", with {' '.join(fit.options)}" if fit.options else ""
    return f"batch.micro_sequences at most {' and '.join(sizes)}{options}" if sizes else "does not fit one device"
