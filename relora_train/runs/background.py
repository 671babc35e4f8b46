"""Work beside a flow: a thread that takes what it is offered, for the length of a `with` block."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Sequence
from typing import Self

TICK_SECONDS = 0.5
"""A wait on the flow's own thread is cut into these, so that a signal is answered on every platform."""


class Background:
    """The thread and its end. A subclass says in `_run` what it does; `_changed` guards what both threads use."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._closing = False
        """True: nothing more is offered, and the thread ends once it is through."""
        self._abandoned = False
        """True: nobody waits for the thread any more."""
        run = contextvars.copy_context().run  # so that log records still belong to the flow around us
        self._thread = threading.Thread(target=run, args=(self._run,), name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def _run(self) -> None:
        raise NotImplementedError

    def _close(self, seconds: float | None) -> None:
        """Take nothing more, and wait so long for the thread to get through; None: until it is."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(TICK_SECONDS if seconds is None else max(0.0, seconds))
        while seconds is None and self._thread.is_alive():
            self._thread.join(TICK_SECONDS)


def pause_after(failures: int, pauses: Sequence[float]) -> float:
    """Return how long to wait after this many failures in a row: the last pause from then on."""
    return pauses[min(failures, len(pauses)) - 1]
