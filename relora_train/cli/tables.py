"""Tables, facts and samples as the `relora` command prints them. Light; decides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_SAMPLE_CHARACTERS = 240
BLANK = Text("")

View = list[RenderableType]
"""Parts to print one after the other."""


def table(*columns: str, title: str | None = None, left: Sequence[str] = ()) -> Table:
    """Return a plain table; all columns but the first and those named in `left` are numbers."""
    made = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        is_text = index == 0 or column in left
        made.add_column(Text(column), justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return made


def rows_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, left: Sequence[str] = ()
) -> Table:
    """Return a table of these rows."""
    made = table(*columns, title=title, left=left)
    for row in rows:
        add_row(made, *row)
    return made


def add_row(made: Table, *cells: str) -> None:
    """Add text as it is: a '[' in a name is no markup."""
    made.add_row(*(Text(cell) for cell in cells))


def common_place(uris: Sequence[str]) -> str:
    """Return the common beginning of these URIs, up to a '/'; '' if there is none."""
    parts = [uri.split("/")[:-1] for uri in uris]
    shared = list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))
    return "".join(f"{column[0]}/" for column in shared)


def facts(values: dict[str, str]) -> Text:
    """Return names and values, one a line; long values are left whole, to be copied."""
    width = max(map(len, values))
    return Text("\n").join(Text.assemble((f"{name:<{width}}", "bold"), f"  {value}") for name, value in values.items())


def show(console: Console, view: Sequence[RenderableType]) -> None:
    """Print the parts of a view. Lines of text are wrapped by nobody but the terminal: a URI can be copied."""
    for part in view:
        console.print(part, soft_wrap=isinstance(part, Text), highlight=False)


def samples_lines(record: dict[str, Any]) -> list[RenderableType]:
    """Return a record's samples, each shortened to a few lines; the prompt is underlined."""
    lines: list[RenderableType] = []
    for sample in record.get("samples", ()):
        text = str(sample["text"])
        shown = text if len(text) <= _SAMPLE_CHARACTERS else f"{text[:_SAMPLE_CHARACTERS]}…"
        line = Text.assemble((printable(str(sample["prompt"])), "underline"), printable(shown.rstrip()))
        lines.append(Padding(line, (0, 0, 0, 4)))
    return lines


def printable(text: str) -> str:
    """Text a model wrote, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "�" for c in text)
