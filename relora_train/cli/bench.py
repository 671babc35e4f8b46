"""`relora bench`: full rank beside ReLoRA of a profile's shape on this device."""

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train.cli.options import AsJson, Sets, answer
from relora_train.cli.output import BLANK, View, console_for_people, table
from relora_train.experiments.bench import StepResult, measure, speed_ratio, step_requests
from relora_train.settings.load import load_profile
from relora_train.text import size


def bench(
    profiles: Annotated[list[str] | None, typer.Argument(metavar="PROFILE", help="quickstart when absent.")] = None,
    sets: Sets = None,
    rounds: Annotated[int, typer.Option(min=1, help="In each round full rank and ReLoRA take turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each in a round.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Measure the training step of a profile, full rank beside ReLoRA: speed, share of the device's peak, memory."""
    console = console_for_people(to_stderr=True)
    loaded = {name: load_profile(name, sets or ()) for name in profiles or ["quickstart"]}
    requests = {name: step_requests(profile, updates=1 + rounds * steps) for name, profile in loaded.items()}
    record: dict[str, Any] = {**about_this_machine(), "profiles": {}}
    for name, arms in requests.items():
        with console.status(f"measuring {name}"):
            record["profiles"][name] = record_of(measure(arms, rounds=rounds, steps=steps, what=name))
    answer(as_json, record, lambda: bench_view(record))


def about_this_machine() -> dict[str, Any]:
    """Return when and with which versions this is measured."""
    versions = {package: version(package) for package in ("torch", "transformers", "relora-train")}
    return {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}


def record_of(results: Mapping[str, StepResult]) -> dict[str, Any]:
    """Return the numbers of every arm, its speed over that of the first one included."""
    first = next(iter(results.values()))
    profile = first.request.profile
    return {
        "device": first.device,
        "precision": profile.precision.dtype,
        "sequences": profile.batch.sequences,
        "sequence_length": profile.batch.sequence_length,
        "rank": profile.relora.rank,
        "dropout": profile.relora.dropout,
        "arms": {
            arm: {
                "tokens_per_second": result.tokens_per_second,
                "step_seconds": list(result.seconds),
                "speed_over_first": speed_ratio(result, first),
                "flops_per_token": result.request.flops_per_token,
                "matmul_flops_per_second": result.matmul_flops,
                "share_of_peak": result.utilisation,
                "memory_bytes": dict(result.memory),
                "matmul_precision": result.matmul_precision,
                "loss": result.loss,
            }
            for arm, result in results.items()
        },
    }


def bench_view(record: Mapping[str, Any]) -> View:
    """Return a table of speed and one of memory for each profile."""
    parts: View = []
    for name, measured in record["profiles"].items():
        arms = measured["arms"]
        title = (
            f"{name}: rank {measured['rank']}, dropout {measured['dropout']:g}, {measured['sequences']} x "
            f"{measured['sequence_length']} tokens, {measured['precision']}, {measured['device']}"
        )
        speed, memory = [], []
        for arm, found in arms.items():
            ratio, sizes = found["speed_over_first"], found["memory_bytes"]
            over = f"{ratio['median']:.2f} ({ratio['lowest']:.2f}–{ratio['highest']:.2f})"
            flops, share = f"{found['flops_per_token'] / 1e6:,.1f}", f"{found['share_of_peak']:.0%}"
            speed.append((arm, f"{found['tokens_per_second']:,.0f}", over, flops, share))
            rest = max(0, sizes["above_weights"] - sizes["gradients"] - sizes["optimizer"])
            memory.append((arm, *map(size, (sizes["weights"], sizes["gradients"], sizes["optimizer"], rest))))
        speed_columns = ("step", "tokens/s", f"x {next(iter(arms))}", "MFLOPs/token", "of peak")
        memory_columns = ("memory", "weights", "gradients", "optimizer", "rest of the peak")
        products = ", ".join(sorted({found["matmul_precision"] for found in arms.values()}))
        parts += [BLANK, table(speed_columns, speed, title=title), BLANK, table(memory_columns, memory)]
        parts.append(Text(f"products: {products}", style="dim"))
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    return [*parts, BLANK, Text(f"Ratios: median of the rounds (lowest–highest). {versions}.", style="dim")]
