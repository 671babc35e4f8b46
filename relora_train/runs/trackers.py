"""The process that tells trackers of a run, by their own clients: `python -m relora_train.runs.trackers`.

Its input is lines of JSON: first a Start, then points; its end ends the process. A tracker that fails is named once and
left out from then on. What a tracker has been told is noted in a file beside its own, so that a run which is resumed
goes on with the same curves, and no step is told twice.
"""

import html
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from relora_train import events
from relora_train.settings.tracking import TrackerName
from relora_train.storage.durable import write_durably

SYSTEM_SECONDS = 15.0
"""Between two looks at the machine."""

_NOTE_SECONDS = 5.0
_GPU_FIELDS = ("utilization.gpu", "memory.used")


class Start(BaseModel):
    """The first line: a run, and who is told of it."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    project: str
    trackers: tuple[TrackerName, ...]
    directory: Path
    settings: dict[str, Any]


class Point(BaseModel):
    """Numbers and texts at one step. The process whose memory is measured is the trainer's."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    step: int
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    pid: int | None = None


class Tracker(Protocol):
    """One client. Steps never go backwards."""

    first_step: int
    """The least step that it takes."""

    def tell(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None: ...

    def close(self) -> None: ...


class _Trackio:
    def __init__(self, start: Start) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(start.directory / "trackio"))
        import trackio

        self._client, self.first_step = trackio, 0
        options = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False, "config": start.settings}
        trackio.init(start.project, name=start.run_id, resume="allow", **options)

    def tell(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._client.log({**numbers, **{key: self._client.Markdown(text) for key, text in texts.items()}}, step=step)

    def close(self) -> None:
        self._client.finish()


class _TensorBoard:
    def __init__(self, start: Start) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer, self.first_step = EventFileWriter(str(start.directory / "tensorboard" / start.run_id)), 0
        self.tell(0, {}, {"settings": f"```\n{json.dumps(start.settings, indent=1)}\n```"})

    def tell(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.plugins.text.summary_v2 import text_pb

        for summary in (
            *(scalar_pb(key, value) for key, value in numbers.items()),
            *(text_pb(key, text) for key, text in texts.items()),
        ):
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, start: Start) -> None:
        import wandb

        place = start.directory / "wandb"
        place.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        names: dict[str, Any] = {"project": start.project, "id": start.run_id, "name": start.run_id, "resume": "allow"}
        self._html = wandb.Html
        self._run = wandb.init(**names, dir=str(start.directory), config=start.settings, settings=settings)
        self.first_step = self._run.step  # of a run that another machine began

    def tell(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        pages = {key: self._html(f"<pre>{html.escape(text)}</pre>", inject=False) for key, text in texts.items()}
        self._run.log({**numbers, **pages}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[TrackerName, Callable[[Start], Tracker]] = {
    "trackio": _Trackio, "tensorboard": _TensorBoard, "wandb": _WandB,
}  # fmt: skip


class Telling:
    """The messages to one tracker, each name at rising steps."""

    def __init__(self, name: TrackerName, start: Start) -> None:
        self._name, self._path = name, start.directory / f"{start.run_id}-{name}.json"
        self._told: dict[str, int] = {}
        self._noted_at = time.monotonic()
        self._tracker: Tracker | None = None
        if self._path.is_file():
            self._told = json.loads(self._path.read_text())
        self._try(lambda: setattr(self, "_tracker", TRACKERS[name](start)))

    def tell(self, point: Point) -> None:
        """Tell what is new in a point."""
        if self._tracker is None or point.step < self._tracker.first_step:
            return
        numbers = {key: value for key, value in point.numbers.items() if self._told.get(key, -1) < point.step}
        texts = {key: text for key, text in point.texts.items() if self._told.get(key, -1) < point.step}
        if not numbers and not texts:
            return
        tracker = self._tracker
        self._try(lambda: tracker.tell(point.step, numbers, texts))
        self._told |= dict.fromkeys((*numbers, *texts), point.step)
        if time.monotonic() - self._noted_at > _NOTE_SECONDS:
            self._note()

    def close(self) -> None:
        """Tell the tracker that the flow has ended."""
        if self._tracker is not None:
            self._try(self._tracker.close)
            self._note()

    def _note(self) -> None:
        self._noted_at = time.monotonic()
        write_durably(self._path, json.dumps(self._told).encode())

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except ModuleNotFoundError as error:
            self._leave_out(f"{error}: pip install 'relora-train[{self._name}]'")
        except BaseException as error:  # wandb ends a process that has no key
            self._leave_out(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")

    def _leave_out(self, why: str) -> None:
        self._tracker = None
        message = f"{self._name} is not told of this run any more, which goes on without it ({why})."
        os.write(1, events.encode("warning", message=message).encode())  # whatever a client has made of sys.stdout


def system_numbers(pid: int | None) -> dict[str, float]:
    """Return the machine's load, the memory of a process, and use and memory of each GPU, as far as they are told."""
    numbers = {"system/load_1m": os.getloadavg()[0]}
    status = Path(f"/proc/{pid}/status")
    if pid is not None and status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                numbers["system/trainer_memory_bytes"] = 1024.0 * int(line.split()[1])
    if (tool := shutil.which("nvidia-smi")) is not None:
        command = [tool, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
        with suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
            for gpu, line in enumerate(told.stdout.splitlines()):
                for field, value in zip(_GPU_FIELDS, line.split(","), strict=False):
                    if value.strip().isdecimal():
                        numbers[f"system/gpu{gpu}_{field.replace('.', '_')}"] = float(value)
    return numbers


def main() -> None:
    """Tell every tracker of the first line what the others say."""
    lines = iter(sys.stdin)
    start = Start.model_validate_json(next(lines))
    start.directory.mkdir(parents=True, exist_ok=True)
    telling = [Telling(name, start) for name in start.trackers]
    pid, looked_at = None, -SYSTEM_SECONDS
    for line in lines:
        point = Point.model_validate_json(line)
        pid = point.pid or pid
        if time.monotonic() - looked_at >= SYSTEM_SECONDS:
            looked_at = time.monotonic()
            point = point.model_copy(update={"numbers": {**point.numbers, **system_numbers(pid)}})
        for one in telling:
            one.tell(point)
    for one in telling:
        one.close()


if __name__ == "__main__":
    main()
