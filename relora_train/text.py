"""Sizes and times as people read them. Light."""

from __future__ import annotations


def size_text(size_bytes: float) -> str:
    """'1.5 GB', in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"


def minutes_text(seconds: float) -> str:
    """'3 min 20 s', '1 h 02 min', '2 d 04 h': of a minute or more."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"
