"""Consoles for people, and the one message of a command that fails. Light."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from relora_train.errors import ConfigError
from relora_train.storage.redaction import masked
from relora_train.storage.workspace import cache_root

_COLUMNS_WITHOUT_TERMINAL = 100
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Controls, of which escapes are made, and marks that reorder what is shown."""


def harmless(text: str) -> str:
    """Return the text with every character replaced that could steer a terminal.

    Names and notes of a store, of a file or of a server may hold anything. All that people read passes here; JSON is
    printed as it is.
    """
    return _STEERING.sub("\N{REPLACEMENT CHARACTER}", text)


class _HarmlessConsole(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


def console_for_people(*, to_stderr: bool = False) -> Console:
    """Standard output or error. Without a terminal, lines are 100 columns wide unless $COLUMNS says otherwise."""
    console = _HarmlessConsole(stderr=to_stderr, highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return _HarmlessConsole(stderr=to_stderr, highlight=False, width=_COLUMNS_WITHOUT_TERMINAL)


def say(message: str) -> None:
    """Print a line of a command's result on standard output."""
    typer.echo(harmless(message))


def tell(message: str) -> None:
    """Print one message on standard error. Its text is shown as it is, brackets included, but for credentials."""
    _print(Text(masked(message)))


def complain(message: str) -> None:
    """Print the message of a command that fails, without the credentials of an address given in a wrong place."""
    _print(Text.assemble(("Error: ", "bold red"), masked(message)))


class Warnings(logging.Handler):
    """For log records that nobody else shows."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def describe_fault(error: Exception, *, verbose: bool) -> str:
    """Return one line for people. The traceback goes to a file; if `verbose`, it follows."""
    text = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if verbose:
        return f"{what}\n{text}"
    path = cache_root() / "faults" / f"{datetime.now():%Y%m%dT%H%M%S}-{os.getpid()}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as unwritten:
        return f"{what}. The traceback could not be written to {path} ({unwritten.strerror}); see it with --verbose."
    return f"{what}. That is a fault of relora or of its machine, not of your input. Traceback: {path}"


def _print(message: Text) -> None:
    console = _HarmlessConsole(stderr=True, highlight=False)
    console.print(message, soft_wrap=not console.is_terminal)


def require_writable(directory: Path, option: str) -> None:
    """Make the directory for a result before the work that it is for. Raises ConfigError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {directory} cannot be made: {error.strerror}. Choose another place.") from None
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"{option} {directory} cannot be written to. Choose another place.")


def was_interrupted(error: BaseException) -> bool:
    """Return True if Ctrl-C caused an error. Libraries that are being imported turn it into an error of their own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt) or KeyboardInterrupt.__name__ in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
