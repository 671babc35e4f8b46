"""How far a long phase of preparation is. Light."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_SECONDS_BETWEEN = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a phase is: 'read', 'train-tokenizer' or 'tokenize'."""

    phase: str
    done_bytes: int
    total_bytes: int | None
    megabytes_per_second: float


OnProgress = Callable[[Progress], None]


class Meter:
    """Tells how far a phase is, twice a second at most, and at its end."""

    def __init__(self, phase: str, total_bytes: int | None, on_progress: OnProgress) -> None:
        self._phase, self._total, self._on_progress = phase, total_bytes, on_progress
        self._done = self._worked = 0
        self._started = self._told = time.monotonic()

    def advance(self, size_bytes: int, worked: bool = True) -> None:
        """Count bytes that are done; with worked=False by an earlier attempt, which says nothing of the speed."""
        self._done += size_bytes
        self._worked += size_bytes if worked else 0
        if time.monotonic() - self._told >= _SECONDS_BETWEEN:
            self.tell()

    def tell(self) -> None:
        """Report now."""
        self._told = time.monotonic()
        self._on_progress(Progress(self._phase, self._done, self._total, round(self.megabytes_per_second, 2)))

    @property
    def megabytes_per_second(self) -> float:
        """Bytes done by this attempt over its time so far."""
        return self._worked / 1e6 / max(1e-3, time.monotonic() - self._started)
