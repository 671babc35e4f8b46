"""The `relora` command. Its start is light: torch, Prefect and boto3 are imported by the commands that need them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from relora_train.cli.bench import bench
from relora_train.cli.commands import looking, planning, results, series, training, upkeep
from relora_train.cli.output import Warnings, complain, describe_fault, tell, was_interrupted
from relora_train.errors import ReLoRAError, TrainerInterruptedError

_EXIT_CODES = """
[bold]Exit codes[/bold]

0 done · 1 an unexpected fault · 2 a command line, profile or setting

3 a corpus or tokenizer · 4 a model · 5 a store · 6 a checkpoint, or verify found something · 7 training

130 stopped by Ctrl-C · 143 stopped by SIGTERM

With --json standard output is JSON alone; progress and messages go to standard error.
"""

app = typer.Typer(
    name="relora",
    help="Train language models with ReLoRA: a warm start at full rank, then low-rank cycles, each merged into the "
    "weights. Every stage ends in a checkpoint that is complete or absent; the same command goes on from there.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_COMMANDS = (
    training.run,
    training.retrain,
    training.compare,
    planning.experiments,
    training.join,
    planning.plan,
    planning.profiles,
    looking.runs,
    looking.checkpoints,
    looking.show,
    training.retry,
    results.evaluate,
    bench,
    results.export,
    results.report,
    results.analyze,
    training.serve,
    upkeep.prune,
    upkeep.verify,
    upkeep.pin,
    upkeep.unpin,
    series.series,
    series.promote,
    series.rollback,
)
"""In the order of `relora --help`."""


@app.callback(invoke_without_command=True)
def relora(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"relora-train {version_of('relora-train')}")
        raise typer.Exit


for _command in _COMMANDS:
    app.command()(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console entry point. Ends with a documented exit code; an error of ours is one message and no traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.lastResort = Warnings(logging.WARNING)
    try:
        typer.main.get_command(app)(given, prog_name="relora")
    except TrainerInterruptedError as error:
        tell(str(error))
        sys.exit(error.exit_code)
    except ReLoRAError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if was_interrupted(error):
            tell("Stopped by Ctrl-C. Every committed stage is kept; the same command goes on from there.")
            sys.exit(TrainerInterruptedError.exit_code)
        complain(describe_fault(error, verbose="--verbose" in given))
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
