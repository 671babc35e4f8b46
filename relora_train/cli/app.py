"""The `relora` command. Its start is light: torch, Prefect and boto3 are imported by the commands that need them."""

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn, cast

import click
import typer

from relora_train.cli.output import Warnings, complain, describe_fault, tell, was_interrupted
from relora_train.errors import ConfigError, ReLoRAError, TrainerInterruptedError

_EXIT_CODES = """
[bold]Exit codes[/bold]

0 done · 1 an unexpected fault · 2 a command line, profile or setting

3 a corpus or tokenizer · 4 a model · 5 a store · 6 a checkpoint, or verify found something · 7 training

130 stopped by Ctrl-C · 143 stopped by SIGTERM

With --json standard output is JSON alone; progress and messages go to standard error.
"""

_COMMANDS = {
    "run": "run", "retrain": "series", "compare": "compare", "join": "run",
    "plan": "plan", "profiles": "plan", "check": "check",
    "runs": "runs", "show": "show", "watch": "watch", "metrics": "watch", "datasets": "datasets",
    "retry": "evaluate", "evaluate": "evaluate", "bench": "bench", "export": "export", "report": "evaluate",
    "analyze": "analyze", "serve": "serve", "deploy": "deploy",
    "prune": "upkeep", "verify": "upkeep", "pin": "upkeep", "delete": "delete",
    "series": "series", "promote": "series",
}  # fmt: skip
"""The module of each command, in the order of `relora --help`."""

_RENAMED = {
    "checkpoints": "show RUN", "experiments": "compare", "unpin": "pin CHECKPOINT --remove",
    "rollback": "promote SERIES --rollback",
}  # fmt: skip
"""Commands of earlier versions, and what does their work now."""


_COMPLETING = "_RELORA_COMPLETE"
"""Set by a shell that asks what could follow; it gives the words in COMP_WORDS, or elsewhere."""


def command_line(names: Iterable[str] = _COMMANDS) -> click.Group:
    """Return the program with these commands. Only their modules are imported."""
    app = typer.Typer(
        name="relora",
        help="Train language models with ReLoRA: a warm start at full rank, then low-rank cycles, each merged into the "
        "weights. Every stage ends in a checkpoint that is complete or absent; the same command goes on from there.",
        epilog=_EXIT_CODES,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        callback=relora,
        invoke_without_command=True,
    )
    for name in names:
        app.command(name)(getattr(import_module(f"relora_train.cli.{_COMMANDS[name]}"), name))
    return cast(click.Group, typer.main.get_command(app))


def relora(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"relora-train {version_of('relora-train')}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with a documented code. An error of ours is one message and no traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.lastResort = Warnings(logging.WARNING)
    if given[:1] and given[0] in _RENAMED:
        complain(f"`relora {given[0]}` is now `relora {_RENAMED[given[0]]}`.")
        sys.exit(ConfigError.exit_code)
    try:
        Path.cwd()
    except FileNotFoundError:
        complain("The directory that you are in was deleted. Change to one that exists (`cd` alone goes home).")
        sys.exit(ConfigError.exit_code)
    typed = os.environ.get("COMP_WORDS", "").split()[1:2] if _COMPLETING in os.environ else given[:1]
    try:
        command_line(typed if typed and typed[0] in _COMMANDS else _COMMANDS)(given, prog_name="relora")
    except ReLoRAError as error:
        show = tell if isinstance(error, TrainerInterruptedError) else complain
        show(str(error))
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
