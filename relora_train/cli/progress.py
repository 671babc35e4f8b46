"""Show a run while it goes: one live bar on a terminal, plain lines at a bounded rate anywhere else.

A display hears the events and warnings of this process and changes nothing about the work: what goes wrong in it is
dropped.
"""

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

_ROOM_FOR_CTRL_C = 4  # a terminal writes ^C where the cursor stands; on the next line it would stay there
_ROOM_FOR_A_BAR = 80  # columns; below, the numbers alone
_DONE, _STORED, _REUSED, _MERGED, _NOTICE, _ARM = "✓", "↑", "○", "+", "!", "›"
_STYLES = {_ARM: "bold", _DONE: "green", _STORED: "dim", _REUSED: "dim", _MERGED: "cyan", _NOTICE: "yellow"}
_TOLD = {"arm_reused": _REUSED, "arm_diverged": _NOTICE, "resumed": _REUSED, "merge": _MERGED}
"""Events that are one line and nothing else."""


class LiveDisplay:
    """One bar, or one line of waiting, at the bottom of a terminal; what stays scrolls above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.short = console.width < 100
        """True if there is room for little."""
        self._spinner = Spinner("dots", style="cyan")
        self._row: tuple[RenderableType, ...] = ()
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=5, transient=True, redirect_stdout=False
        )
        self._live.start()
        self.refresh, self.close = self._live.refresh, self._live.stop

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
        percent = [f"{100 * done / total:3.0f}%"] if total else []
        if self._console.width < _ROOM_FOR_A_BAR:  # as one text, or a grid would cut the name first
            told = [name, text] if text else [name, *percent]
            self._row = (Text("  ".join(told), overflow="ellipsis", no_wrap=True),)
            return
        bar = ProgressBar(total=total, completed=done, pulse=total is None)
        self._row = (Text(name), bar, *percent, Text(text, no_wrap=True))

    def _render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=len(self._row) > 1)
        for cell in ("", *self._row):
            grid.add_column(no_wrap=True, ratio=1 if isinstance(cell, ProgressBar) else None)
        grid.add_row(self._spinner, *self._row)
        return Constrain(grid, max(1, self._console.width - _ROOM_FOR_CTRL_C))


class PlainDisplay:
    """Lines without control codes, the same work at most every PLAIN_SECONDS."""

    short = False

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock, self._last = console, clock, clock()

    def line(self, mark: str, text: str) -> None:
        self._console.print(Text(f"{mark} {text}"), highlight=False, soft_wrap=True)

    def started(self, text: str) -> None:
        self._last = self._clock()
        self.line(" ", text)

    def waiting(self, text: str) -> None:
        """Print nothing: the next line will tell."""

    def counted(self, name: str, done: float, total: float | None, text: str) -> None:
        if self._clock() - self._last >= PLAIN_SECONDS:
            percent = f"{100 * done / total:.0f}%  " if total else ""
            self.started(f"{name}  {percent}{text}")

    def close(self) -> None:
        """Nothing to undo."""


class RunProgress(logging.Handler):
    """Turns the events and warnings of a run into what its display shows. `stages` are the plan's, in order."""

    def __init__(self, display: LiveDisplay | PlainDisplay, stages: Sequence[str]) -> None:
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
            if event := getattr(record, "event", None):
                self.show(event)
            elif record.levelno >= logging.WARNING:
                self._notice(record.getMessage().strip().partition("\n")[0])
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Leave out an event that cannot be shown: a display never stops a training."""

    def _notice(self, text: str) -> None:
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
        display, stage = self._display, event.get("stage", "")
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
            case str(name) if name in _TOLD:
                display.line(_TOLD[name], event_line(event))
            case "dataset_ready":
                if not event["reused"] or event.get("uri") not in self._datasets:
                    display.line(_REUSED if event["reused"] else _DONE, event_line(event))
                self._datasets.add(event.get("uri"))
                display.waiting(f"starting {next(iter(self._stages), None)}")
            case "stage_started":
                display.started(event_line(event))
            case "progress":
                done, steps = event["step"] - event["start_step"], event["end_step"] - event["start_step"]
                if done < steps:
                    display.counted(stage, done, steps, event_line(event, short=display.short))
                else:
                    display.waiting(f"{stage}: step {event['step']:,} is done, evaluating")
            case "evaluation" if event.get("when") == "before":
                self._before[stage] = event[measures_in(event).headline.key]
            case "stage_committed":
                display.waiting(f"{stage}: storing the checkpoint")
            case "stage_finished":
                display.line(_DONE, event_line(event, before=self._before.get(stage)))
                display.waiting(self._next(stage))
                if event.get("uri") is None:
                    self._show_half_stored(stage)
            case "checkpoint_stored":
                self._show_half_stored(stage)
            case "diverged" | "retrying":
                self._notice(event_line(event))
            case "stage_skipped":
                display.line(_REUSED, event_line(event))
                display.waiting(self._next(stage))
            case "evaluated":
                display.line(_REUSED if event["reused"] else _DONE, event_line(event))
                display.waiting("evaluating and writing the report")

    def _show_half_stored(self, stage: str) -> None:
        """Called when a stage is trained and when it is stored, in either order: the second call shows it as stored."""
        is_last = self._stages[-1:] == (stage,)
        if stage not in self._half_stored:
            self._half_stored.add(stage)
            if is_last:
                self._display.waiting(f"{stage}: storing the checkpoint")
            return
        self._half_stored.remove(stage)
        self._display.line(_STORED, f"{stage}: stored")
        if is_last:
            self._display.waiting(self._next(stage))

    def _next(self, stage: str) -> str:
        later = self._stages[self._stages.index(stage) + 1 :] if stage in self._stages else ()
        return f"starting {later[0]}" if later else "evaluating and writing the report"


class LastSnapshot(logging.Handler):
    """Remembers the last state that a trainer saved."""

    text = "Every committed stage is kept."

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None) or {}
        if event.get("event") == "snapshot_committed":
            self.text = f"The state of {event['stage']} at step {event['step']:,} is saved."
        elif event.get("event") in ("stage_finished", "stage_skipped"):
            self.text = f"{event['stage']} and what is before it is kept."


@contextmanager
def shown_progress(console: Console, stages: Sequence[str], *, first: str) -> Iterator[RunProgress]:
    """Show the events of this process on a console while the block runs, beginning with the line `first`."""
    display = LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
    progress = RunProgress(display, stages)
    events.listen(progress)
    try:
        display.started(first)
        display.waiting(first)
        yield progress
    finally:
        events.unlisten(progress)
        display.close()
