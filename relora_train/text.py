"""Numbers, sizes and times as people read them: thousand separators, units, '–' for what is missing."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

MISSING = "–"


def count(value: float | None) -> str:
    """'12,345'."""
    return _shown(value, lambda number: f"{number:,.0f}")


def short_count(value: float | None) -> str:
    """'840', '10.2K', '1.235M', '6.8B'."""

    def shorten(number: float) -> str:
        for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
            if number >= limit:
                return f"{number / limit:.4g}{unit}"
        return f"{number:.0f}"

    return _shown(value, shorten)


def decimal(value: float | None, digits: int = 2) -> str:
    """'1,234.56' for two digits."""
    return _shown(value, lambda number: f"{number:,.{digits}f}")


def scientific(value: float | None) -> str:
    """'3.1e-7', and plain '0' for zero."""
    return _shown(value, lambda number: f"{number:.1e}".replace("e-0", "e-").replace("e+0", "e+") if number else "0")


def percent(value: float | None, digits: int = 1) -> str:
    """'98.7 %' for 0.987."""
    return _shown(value, lambda number: f"{100 * number:,.{digits}f} %")


def size(size_bytes: float | None, form: str = ".1f") -> str:
    """'1.5 GB', in powers of 1000."""

    def in_units(number: float) -> str:
        for unit in ("B", "kB", "MB", "GB"):
            if number < 1000:
                return f"{number:.0f} B" if unit == "B" else f"{number:{form}} {unit}"
            number /= 1000
        return f"{number:,{form}} TB"

    return _shown(size_bytes, in_units)


def duration(seconds: float | None) -> str:
    """'4.2 s', '48 s', '3 min 20 s', '1 h 02 min', '2 d 04 h'."""

    def in_units(number: float) -> str:
        if round(number) < 60:
            return f"{number:.1f} s" if number < 9.95 else f"{number:.0f} s"
        minutes, rest = divmod(round(number), 60)
        if minutes < 60:
            return f"{minutes} min {rest:02d} s"
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"

    return _shown(seconds, in_units)


def short_duration(seconds: float | None) -> str:
    """Return the same in a narrow column: '4.2s', '48s', '3m 20s', '1h 02m', '2d 04h'."""
    return re.sub(r"(?<=\d) (?=[shd])", "", duration(seconds).replace(" min", "m"))


def steps_text(start_step: int, end_step: int) -> str:
    """'201–400': the first and the last update."""
    return f"{start_step + 1:,}–{end_step:,}"


def moment(when: datetime) -> str:
    """Return the local time, to the minute."""
    return f"{when.astimezone():%Y-%m-%d %H:%M}"


def capitalized(name: str) -> str:
    """Return the name of a score as a title has it; TASK/METRIC stays as it is."""
    return name if "/" in name else name.capitalize()


def counted(number: int, noun: str) -> str:
    """'1 stage', '5 stages'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'tale'?" for the known name that is closest, or '' if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def markdown_cell(text: str, *, code: bool = False) -> str:
    """Text that can leave neither its cell of a Markdown table nor, with `code`, its backticks."""
    flat = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return flat if code else flat.replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; all columns but the first are numbers."""
    lines = [f"| {' | '.join(header)} |", f"|:--|{'--:|' * (len(header) - 1)}"]
    return lines + [f"| {' | '.join(map(markdown_cell, row))} |" for row in rows]


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return form(value)
