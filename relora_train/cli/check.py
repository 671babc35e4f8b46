"""`relora check`: what of a run would work with one's own model."""

from typing import Annotated

import typer

from relora_train.cli.options import AsJson, answer
from relora_train.cli.output import BLANK, View, console_for_people, facts, table
from relora_train.errors import ModelUnsuitableError
from relora_train.text import short_count


def check(
    model: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="A causal language model in safetensors.")],
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the low-rank updates.")] = 4,
    targets: Annotated[
        list[str] | None, typer.Option("--target", metavar="NAME", help="As in relora.target_modules. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try a model: load, wrap, train a few updates, merge, write, load again, adapter in peft. CPU, float32."""
    from transformers.utils.logging import set_verbosity_error

    from relora_train.training.model_trial import Trial, try_model

    set_verbosity_error()  # it takes a random token for padding
    with console_for_people(to_stderr=True).status(f"trying {model}"):
        trial = try_model(model, revision=revision, rank=rank, target_modules=tuple(targets) if targets else None)

    def view(trial: Trial) -> View:
        kinds: dict[str, int] = {}
        for name in trial.wrapped:
            kinds[name.rpartition(".")[2]] = kinds.get(name.rpartition(".")[2], 0) + 1
        about = {
            "family": trial.family,
            "parameters": short_count(trial.parameters),
            "wrapped": ", ".join(f"{count} {name}" for name, count in kinds.items()),
            "by kind": ", ".join(f"{name} {short_count(number)}" for name, number in trial.kinds.items()),
        }
        words = {True: "works", False: "fails", None: "–"}
        rows = [
            (each.part, words[each.works], "" if each.error is None else f"{each.error:.1e}", each.said)
            for each in trial.findings
        ]
        return [facts(about), BLANK, table(("part", "result", "error", "found"), rows, left=("result", "found"))]

    answer(as_json, trial, lambda: view(trial))
    if trial.faults:
        faults = "; ".join(f"{each.part}: {each.said}" for each in trial.faults)
        raise ModelUnsuitableError(f"A run of {model!r} would not be right ({faults}). Train another model.")
