"""Where people read: consoles, and the one message with which a command ends badly. Light."""

from __future__ import annotations

import os
import traceback
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from relora_train.errors import ConfigError
from relora_train.workspace import cache_root

_COLUMNS_WITHOUT_TERMINAL = 100


def console_for_people(*, to_stderr: bool = False) -> Console:
    """Standard output or error. Without a terminal, lines are 100 columns wide unless $COLUMNS says otherwise."""
    console = Console(stderr=to_stderr, highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(stderr=to_stderr, highlight=False, width=_COLUMNS_WITHOUT_TERMINAL)


def tell(message: str) -> None:
    """One message on standard error; its text is shown as it is, brackets included."""
    _print(Text(message))


def complain(message: str) -> None:
    """The message with which a command fails."""
    _print(Text.assemble(("Error: ", "bold red"), message))


def describe_fault(error: Exception, *, verbose: bool) -> str:
    """One line for people; the traceback goes to a file, or follows where it was asked for."""
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
    console = Console(stderr=True, highlight=False)
    console.print(message, soft_wrap=not console.is_terminal)


def require_writable(path: Path, option: str, *, directory: bool) -> None:
    """Refuse a place for a result before the work that it is for. A directory is made. Raises ConfigError."""
    try:
        if directory:
            path.mkdir(parents=True, exist_ok=True)
        elif path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"{option} {path} cannot be a file there. Choose a path in a directory that exists.")
        if not os.access(path if directory else path.parent, os.W_OK):
            raise ConfigError(f"{option} {path} cannot be written to. Choose another place.")
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be made: {error.strerror}. Choose another place.") from None


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C lies behind an error: libraries turn one that arrives while they are imported into their own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt) or KeyboardInterrupt.__name__ in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
