"""Pieces of an HTML page in which every string from the outside is escaped: only `Html` passes as markup."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Html(str):
    """Text that is markup already."""


Cell = str | Html


def details(title: str, content: str, *, printed: bool = True) -> Html:
    """A section that opens on demand; `printed` opens it on paper."""
    kind = ' class="printed"' if printed else ""
    return Html(f"<details{kind}><summary>{escape(title)}</summary>{content}</details>")


def figure(picture: tuple[bytes, bytes], title: str, caption: str) -> Html:
    """An embedded PNG in its light and its dark form; paper takes the light one."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}" for png in picture)
    return Html(
        f"<figure><h3>{escape(title)}</h3><picture>"
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(title)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, prose: bool = False) -> Html:
    """A row of one cell spans the table: an address under the row it belongs to. prose: cells hold sentences, which
    are set from the left and wrap."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in header)
    lines = []
    for row in rows:
        if len(row) == 1 < len(header):
            lines.append(f'<tr class="address"><td colspan="{len(header)}">{escape(row[0])}</td></tr>')
        else:
            lines.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    body = "".join(lines)
    kind = ' class="prose"' if prose else ""
    return Html(f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def note(text: str) -> Html:
    return Html(f'<p class="note">{escape(text)}</p>')


def escape(text: Cell) -> Html:
    """Text as markup; control and direction-changing characters become a replacement character."""
    return text if isinstance(text, Html) else Html(html.escape(_UNPRINTABLE.sub("\ufffd", text)))
