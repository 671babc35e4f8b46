"""Show a run while it goes: one live bar on a terminal, plain lines at a bounded rate anywhere else.

A display hears the events of this process (events.py) and changes nothing about the work: what goes wrong in it is
dropped. Light.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from relora_train import events
from relora_train.events import Event
from relora_train.reports.event_text import event_line
from relora_train.settings.objectives import measures_in

PLAIN_SECONDS = 10.0
"""Between two plain lines of the same work."""

_SHORT_BELOW_COLUMNS = 100
_ROOM_FOR_CTRL_C = 4  # a terminal writes ^C where the cursor stands; on the next line it would stay there
_DONE, _STORED, _REUSED, _MERGED, _NOTICE, _ARM = "✓", "↑", "○", "+", "!", "›"
_STYLES = {_ARM: "bold", _DONE: "green", _STORED: "dim", _REUSED: "dim", _MERGED: "cyan", _NOTICE: "yellow"}


class LiveDisplay:
    """One bar, or one line of waiting, at the bottom of a terminal; what stays scrolls above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner = Spinner("dots", style="cyan")
        self._row: tuple[RenderableType, ...] = ()
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=5, transient=True, redirect_stdout=False
        )
        self._live.start()

    @property
    def short(self) -> bool:
        """Return True if there is room for little."""
        return self._console.width < _SHORT_BELOW_COLUMNS

    def line(self, mark: str, text: str) -> None:
        """Print something that stays."""
        self._console.print(Text.assemble((mark, _STYLES[mark]), f" {text}"), highlight=False)

    def started(self, text: str) -> None:
        """Print nothing: the bar shows it."""

    def waiting(self, text: str) -> None:
        """Show what happens while nothing is counted."""
        self._row = (Text(f"{text} …", style="dim", overflow="ellipsis", no_wrap=True),)

    def counted(self, name: str, done: float, total: float | None, text: str) -> None:
        """Show that the work `name` has come to `done` of `total`."""
        bar = ProgressBar(total=total, completed=done, pulse=total is None)
        self._row = (Text(name), bar, *([f"{100 * done / total:3.0f}%"] if total else []), Text(text, no_wrap=True))

    def refresh(self) -> None:
        """Draw now, rather than within a fifth of a second."""
        self._live.refresh()

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=len(self._row) > 1)
        for cell in ("", *self._row):
            grid.add_column(no_wrap=True, ratio=1 if isinstance(cell, ProgressBar) else None)
        grid.add_row(self._spinner, *self._row)
        return Constrain(grid, max(1, self._console.width - _ROOM_FOR_CTRL_C))


class PlainDisplay:
    """Lines without control codes, the same work at most every PLAIN_SECONDS."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._last = clock()

    @property
    def short(self) -> bool:
        return False

    def line(self, mark: str, text: str) -> None:
        self._console.print(Text(f"{mark} {text}"), highlight=False, soft_wrap=True)

    def waiting(self, text: str) -> None:
        """Nothing: the next line will tell."""

    def counted(self, name: str, done: float, total: float | None, text: str) -> None:
        now = self._clock()
        if now - self._last >= PLAIN_SECONDS:
            self._last = now
            percent = f"{100 * done / total:.0f}%  " if total else ""
            self._console.print(Text(f"  {name}  {percent}{text}"), highlight=False, soft_wrap=True)

    def started(self, text: str) -> None:
        self._last = self._clock()
        self._console.print(Text(f"  {text}"), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing to undo."""


Display = LiveDisplay | PlainDisplay


class RunProgress(logging.Handler):
    """Turns the events of a run into what its display shows. `stages` are the names of the plan, in order."""

    def __init__(self, display: Display, stages: Sequence[str]) -> None:
        super().__init__()
        self._display = display
        self._stages = tuple(stages)
        self._before: dict[str, float] = {}
        self._stopping = False
        self._half_stored: set[str] = set()
        """Stages of which one event of two has come: trained or stored."""
        self._datasets: set[str | None] = set()
        """Said already: the runs of an experiment share one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.show(getattr(record, "event", {}))
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Leave out an event that cannot be shown: a display never stops a training."""

    def notice(self, text: str) -> None:
        """Show a warning, or the announcement of a retry."""
        self._display.line(_NOTICE, text)
        self._display.waiting("going on")

    def stopping(self) -> None:
        """From now on show nothing but that the run is being stopped."""
        self._stopping = True
        self._display.waiting("stopping")

    def show(self, event: Event) -> None:
        """Show one event; unknown ones are left out."""
        if self._stopping:
            return
        display = self._display
        match event.get("event"):
            case "tokenize_progress":
                total = event.get("total_bytes")
                display.counted(str(event.get("phase", "tokenize")), event["done_bytes"], total, event_line(event))
            case "measuring":
                display.counted(str(event["what"]), event["done"], event["total"], "")
            case "arm_started":
                self._stages = tuple(event["stages"])
                self._half_stored.clear()
                display.line(_ARM, event_line(event))
                display.waiting("starting")
            case "arm_reused":
                display.line(_REUSED, event_line(event))
            case "arm_diverged":
                display.line(_NOTICE, event_line(event))
            case "dataset_ready" if event["reused"] and event.get("uri") in self._datasets:
                display.waiting(f"starting {self._after(None)}")
            case "dataset_ready":
                self._datasets.add(event.get("uri"))
                display.line(_REUSED if event["reused"] else _DONE, event_line(event))
                display.waiting(f"starting {self._after(None)}")
            case "stage_started":
                display.started(event_line(event))
            case "resumed":
                display.line(_REUSED, event_line(event))
            case "progress":
                self._show_step(event)
            case "evaluation" if event.get("when") == "before":
                self._before[event["stage"]] = event[measures_in(event).headline.key]
            case "merge":
                display.line(_MERGED, event_line(event))
            case "stage_committed":
                display.waiting(f"{event['stage']}: storing the checkpoint")
            case "stage_finished":
                self._show_finished(event)
            case "checkpoint_stored":
                self._show_half_stored(event["stage"])
            case "diverged":
                self.notice(event_line(event))
            case "stage_skipped":
                display.line(_REUSED, event_line(event))
                display.waiting(self._next(event["stage"]))
            case "evaluated":
                display.line(_REUSED if event["reused"] else _DONE, event_line(event))
                display.waiting("evaluating and writing the report")

    def _show_step(self, event: Event) -> None:
        done, total = event["step"] - event["start_step"], event["end_step"] - event["start_step"]
        if done < total:
            self._display.counted(event["stage"], done, total, event_line(event, short=self._display.short))
        else:
            self._display.waiting(f"{event['stage']}: step {event['step']:,} is done, evaluating")

    def _show_finished(self, event: Event) -> None:
        stage = event["stage"]
        self._display.line(_DONE, event_line(event, before=self._before.get(stage)))
        self._display.waiting(self._next(stage))
        if event.get("uri") is None:
            self._show_half_stored(stage)

    def _show_half_stored(self, stage: str) -> None:
        """Called when a stage is trained and when it is stored, in either order: the second call shows it as stored."""
        is_last = stage in self._stages and not self._after(stage)
        if stage not in self._half_stored:
            self._half_stored.add(stage)
            if is_last:
                self._display.waiting(f"{stage}: storing the checkpoint")
            return
        self._half_stored.remove(stage)
        self._display.line(_STORED, f"{stage}: stored")
        if is_last:
            self._display.waiting(self._next(stage))

    def _after(self, stage: str | None) -> str | None:
        rest = self._stages if stage is None else self._stages[self._stages.index(stage) + 1 :]
        return rest[0] if rest else None

    def _next(self, stage: str) -> str:
        following = self._after(stage) if stage in self._stages else None
        return f"starting {following}" if following else "evaluating and writing the report"


@contextmanager
def shown_progress(console: Console, stages: Sequence[str], *, first: str) -> Iterator[RunProgress]:
    """Show the events of this process on a console while the block runs, beginning with the line `first`."""
    display: Display = LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
    progress = RunProgress(display, stages)
    events.listen(progress)
    try:
        display.started(first)
        display.waiting(first)
        yield progress
    finally:
        events.unlisten(progress)
        display.close()
