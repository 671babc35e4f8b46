"""B5: what compiling a stage costs, how many graphs it makes, and whether its losses stay."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from check_run import Run
from stages import release, shape_request, shape_stage, updates_of
from torch._dynamo.utils import counters

from relora_train.training.evaluate import evaluate_model
from relora_train.training.step import StageTraining

SECOND_PROCESS_LIMIT = 120


def compiling(run: Run) -> None:
    eager = losses_of(built(run, compiled=False))
    for checkpointing in (False, True):
        name = "checkpointing" if checkpointing else "compiled"
        found, losses = compiled_stage(run, checkpointing=checkpointing)
        run.record(**{name: found, f"losses, {name} and eager": [losses, eager]})
        breaks, after_four = found["graph breaks"], found["graphs after four updates"]
        short, evaluated = found["graphs after a short micro-batch"], found["graphs after an evaluation"]
        run.require(f"{name}: graph breaks {breaks}", not breaks)
        run.require(f"{name}: {found['graphs']} graphs, {after_four} after four updates", found["graphs"] == after_four)
        more = short - after_four  # one of the blocks, one of the loss's rows
        run.require(f"{name}: {more} graphs for a short micro-batch", 1 <= more <= 2)
        run.require(f"{name}: {evaluated - short} graphs for an evaluation", evaluated == short)
        worst = max(abs(a - b) / b for a, b in zip(losses, eager, strict=True))
        run.below(f"loss beside eager, {name}", worst, 1e-2)
    # A dry run compiles nothing that is kept.
    run.record(**{"second process": "skipped in a dry run" if run.dry else second_process(run)})


def built(run: Run, *, compiled: bool, checkpointing: bool = False) -> StageTraining:
    """Return four blocks of llama_1b: all blocks of a model share a graph."""
    release(run)
    counters.clear()
    request = shape_request(
        run,
        "llama_1b",
        model__num_hidden_layers=2 if run.dry else 4,
        relora__dropout_mask="hash",
        launch__compile=compiled,
        launch__gradient_checkpointing=checkpointing,
    )
    return shape_stage(run, request)


def losses_of(training: StageTraining) -> list[float]:
    found = []
    for step in updates_of(training)[:4]:
        found.append(float(training.update(step)[0]))
        training.optimizer.zero_grad(set_to_none=True)
    return found


def compiled_stage(run: Run, *, checkpointing: bool) -> tuple[dict[str, Any], list[float]]:
    started = time.perf_counter()
    training = built(run, compiled=True, checkpointing=checkpointing)
    found: dict[str, Any] = {"build_s": time.perf_counter() - started}
    steps = updates_of(training)
    started = time.perf_counter()
    losses = [float(training.update(steps[0])[0])]
    found |= {"first_update_s": time.perf_counter() - started, "graphs": graphs()}
    training.optimizer.zero_grad(set_to_none=True)
    for step in steps[1:4]:
        losses.append(float(training.update(step)[0]))
        training.optimizer.zero_grad(set_to_none=True)
    found["graphs after four updates"] = graphs()
    training.loss_function.loss(training.batches.batch(0, last=True)[:1].to(training.ranks.device)).backward()
    found["graphs after a short micro-batch"] = graphs()
    for sequences in (1, 2):  # batches of other shapes
        evaluate_model(
            training.model,
            training.loss_function,
            training.val_data,
            training.objective,
            training.ranks,
            sequences=sequences,
        )
    found["graphs after an evaluation"] = graphs()
    found["graph breaks"] = dict(counters["graph_break"])
    return found, losses


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def second_process(run: Run) -> dict[str, Any]:
    """Compile the same in a process of its own, by what inductor has kept."""
    command = [sys.executable, str(Path(__file__).resolve()), run.device_type, str(run.scratch)]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECOND_PROCESS_LIMIT, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return {"error": str(error), "said": str(error.stderr)[-800:]}
    seconds = time.perf_counter() - started
    return {**json.loads(done.stdout.splitlines()[-1]), "whole_process_s": seconds}


def main() -> None:
    run = Run(
        tell=lambda values: None,
        device_type=sys.argv[1],
        scratch=Path(sys.argv[2]) / "second",
        shared=Path(sys.argv[2]),
    )
    run.scratch.mkdir()
    found, _ = compiled_stage(run, checkpointing=False)
    sys.stdout.write(json.dumps({**found, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
