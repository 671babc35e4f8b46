"""How far the preparation of a dataset is, and how fast."""

import time
from collections.abc import Callable
from typing import Any

_PROGRESS_SECONDS = 0.5  # between two reports of how far a phase is


OnProgress = Callable[[dict[str, Any]], None]
"""Is told how far a phase ('read', 'train-tokenizer' or 'tokenize') is: the fields of the event tokenize_progress."""


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
        if time.monotonic() - self._told >= _PROGRESS_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Report now."""
        self._told = time.monotonic()
        far = {"phase": self._phase, "done_bytes": self._done, "total_bytes": self._total}
        self._on_progress({**far, "megabytes_per_second": round(self.megabytes_per_second, 2)})

    @property
    def megabytes_per_second(self) -> float:
        """Bytes done by this attempt over its time so far."""
        return self._worked / 1e6 / max(1e-3, time.monotonic() - self._started)
