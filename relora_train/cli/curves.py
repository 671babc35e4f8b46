"""Curves for a terminal, in braille: two by four dots a character."""

import itertools
import math
from collections.abc import Iterable, Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_LABEL = 8
MARK = "┊"

Points = Sequence[tuple[float, float]]


def curve(
    points: Points, *, width: int, height: int, span: tuple[float, float], marks: Iterable[float] = ()
) -> list[str]:
    """Return the lines of a curve over `span`, with its least and greatest value at the left.

    Points are joined in the order of x. A mark is a dotted vertical. Numbers that are not finite are left out.
    """
    columns, rows = 2 * max(1, width - _LABEL - 1), 4 * height
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    low, high = min((y for _, y in finite), default=0.0), max((y for _, y in finite), default=0.0)
    first, last = span

    def column(x: float) -> int:
        return round((x - first) / max(last - first, 1e-9) * (columns - 1))

    def row(y: float) -> int:
        return round((high - y) / (high - low) * (rows - 1)) if high > low else rows // 2

    cells = [[0] * (columns // 2) for _ in range(height)]

    def draw(at: int, dot: int) -> None:
        if 0 <= at < columns:
            cells[dot // 4][at // 2] |= _DOTS[dot % 4][at % 2]

    places = [(column(x), row(y)) for x, y in sorted(finite)]
    for (left, top), (right, bottom) in itertools.pairwise([*places[:1], *places]):
        steps = max(right - left, abs(bottom - top), 1)
        for step in range(1, steps + 1):
            draw(left + round((right - left) * step / steps), top + round((bottom - top) * step / steps))
    marked = {column(x) // 2 for x in marks}
    labels = [""] * height
    if finite:
        labels[0], labels[-1] = f"{high:.3g}", f"{low:.3g}"
    lines = []
    for number, label in enumerate(labels):
        drawn = (chr(0x2800 + dots) if dots else MARK if at in marked else " " for at, dots in enumerate(cells[number]))
        lines.append(f"{label:>{_LABEL}} {''.join(drawn)}".rstrip())
    return lines


def axis(span: tuple[float, float], *, width: int) -> str:
    """Return the line below a curve: the first and the last step."""
    first, last = f"{span[0]:,.0f}", f"{span[1]:,.0f}"
    return f"{'step':>{_LABEL}} {first}{last:>{max(1, width - _LABEL - 1 - len(first))}}"
