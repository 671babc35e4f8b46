"""Consoles, tables and facts for people, and the one message of a command that fails."""

import itertools
import logging
import os
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from relora_train.errors import ConfigError
from relora_train.storage.opening import uri_to_path
from relora_train.storage.redaction import masked
from relora_train.storage.workspace import cache_root
from relora_train.text import count, decimal

_COLUMNS_WITHOUT_TERMINAL = 100
_SAMPLE_CHARACTERS = 240
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Controls, of which escapes are made, and marks that reorder what is shown."""

BLANK = Text("")

View = list[RenderableType]
"""Parts to print one after the other."""


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
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _COLUMNS_WITHOUT_TERMINAL
    return console


class CellTable(Table):
    """A table that knows its cells, so that it can be shown as blocks where a name would have to be broken."""

    cells: list[tuple[str, ...]]

    def fit(self, width: int) -> bool:
        """Give every number and every word room in its column: an id or a URI is one word. False: there is no room.

        rich takes from the widest columns that wrap until they are equal, and breaks words for it.
        """
        rows = [tuple(str(column.header) for column in self.columns), *self.cells]
        spare = width - 2 * (len(self.columns) - 1)
        for i, column in enumerate(self.columns):
            parts = [part for row in rows for part in ([row[i]] if column.no_wrap else row[i].split())]
            column.width = max(map(cell_len, parts), default=0)
            spare -= column.width
        for i, column in enumerate(self.columns):
            more = max(0, min(spare, max(cell_len(row[i]) for row in rows) - (column.width or 0)))
            column.width, spare = (column.width or 0) + more, spare - more
        return spare >= 0

    def as_blocks(self) -> Text:
        """Return a block of lines for each row: its first cell, then name and value of the others.

        Marks of one character stand before the cells of the second column.
        """
        titles = 2 if all(len(row[0]) == 1 for row in self.cells) and not str(self.columns[0].header) else 1
        names = [str(column.header) for column in self.columns][titles:]
        width = max(map(cell_len, names), default=0)
        blocks = [Text(str(self.title), style="bold")] if self.title else []
        for row in self.cells:
            named = zip(names, row[titles:], strict=True)
            lines = [f"  {name:<{width}}  {cell}".rstrip() for name, cell in named if cell]
            blocks.append(Text("\n").join([Text(" ".join(row[:titles]), style="bold"), *map(Text, lines)]))
        return Text("\n").join(blocks)


class Indented:
    """Text that is wrapped four columns from the left, without spaces at the ends of lines."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.text.wrap(console, max(1, options.max_width - 4), overflow="fold"):
            line.rstrip()
            yield Text.assemble("    ", line)


def show(console: Console, view: Sequence[RenderableType]) -> None:
    """Print the parts of a view. Lines of text are wrapped by nobody but the terminal: a URI can be copied.

    A table for which the console is too narrow is printed as blocks.
    """
    for part in view:
        shown = part.as_blocks() if isinstance(part, CellTable) and not part.fit(console.width) else part
        console.print(shown, soft_wrap=isinstance(shown, Text), highlight=False)


def say(message: str) -> None:
    """Print a line of a command's result on standard output."""
    typer.echo(harmless(message))


def tell(message: str | Text) -> None:
    """Print one message on standard error. Its text is shown as it is, brackets included, but for credentials."""
    console = _HarmlessConsole(stderr=True, highlight=False)
    console.print(message if isinstance(message, Text) else Text(masked(message)), soft_wrap=not console.is_terminal)


def complain(message: str) -> None:
    """Print the message of a command that fails, without the credentials of an address given in a wrong place."""
    tell(Text.assemble(("Error: ", "bold red"), masked(message)))


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


def was_interrupted(error: BaseException) -> bool:
    """Return True if Ctrl-C caused an error. Libraries that are being imported turn it into an error of their own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt) or KeyboardInterrupt.__name__ in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def require_writable(directory: Path, option: str) -> None:
    """Make the directory for a result before the work that it is for. Raises ConfigError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {directory} cannot be made: {error.strerror}. Choose another place.") from None
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"{option} {directory} cannot be written to. Choose another place.")


def place(uri: str) -> str:
    """Return a path for what lies on this machine, else the URI."""
    return str(uri_to_path(uri)) if uri.startswith("file://") else uri


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, left: Sequence[str] = ()
) -> CellTable:
    """Return a plain table; all columns but the first and those named in `left` are numbers.

    Text is shown as it is: a '[' in a name is no markup.
    """
    made = CellTable(box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)
    made.title, made.title_justify, made.title_style = title, "left", "bold"
    for index, column in enumerate(columns):
        is_text = index == 0 or column in left
        made.add_column(Text(column), justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    made.cells = [tuple(row) for row in rows]
    for row in made.cells:
        made.add_row(*map(Text, row))
    return made


def facts(values: Mapping[str, str]) -> Text:
    """Return names and values, one a line; long values are left whole, to be copied."""
    width = max(map(len, values))
    return Text("\n").join(Text.assemble((f"{name:<{width}}", "bold"), f"  {value}") for name, value in values.items())


def common_place(uris: Sequence[str]) -> str:
    """Return the common beginning of these URIs, up to a '/'; '' if there is none."""
    columns = zip(*(uri.split("/")[:-1] for uri in uris), strict=False)
    return "".join(f"{column[0]}/" for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def samples_lines(record: dict[str, Any]) -> View:
    """Return a record's samples, each shortened to a few lines; the prompt is underlined."""
    lines: View = []
    for sample in record.get("samples", ()):
        text = str(sample["text"])
        shown = text if len(text) <= _SAMPLE_CHARACTERS else f"{text[:_SAMPLE_CHARACTERS]}…"
        line = Text.assemble((harmless(str(sample["prompt"])), "underline"), harmless(shown.rstrip()))
        lines.append(Indented(line))
    return lines


def task_table(scores: Iterable[Mapping[str, Any]], *, title: str | None = None) -> CellTable:
    """Return scores by tasks; an arrow tells which direction is better, where the harness says so."""
    arrows = {True: " ↑", False: " ↓"}
    rows = [
        (
            f"{one['score']}{arrows.get(one['higher_is_better'], '')}",
            decimal(one["value"], 4 if abs(one["value"]) < 1000 else 0),
            decimal(one["stderr"], 4),
            count(one["shots"]),
            count(one["documents"]),
            str(one["version"]),
        )
        for one in scores
    ]
    return table(("score", "value", "± stderr", "shots", "documents", "version"), rows, title=title)
