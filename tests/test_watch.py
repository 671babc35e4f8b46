"""`relora watch` and `relora metrics`: what another process trains, seen from the store alone."""

import csv
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from synthetic_run import commit_run, synthetic_profile
from test_runs import STAGES, progress

from relora_train import events
from relora_train.checkpoints.lease import hold_run
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.status import read_status
from relora_train.cli.curves import MARK, axis, curve
from relora_train.cli.output import show
from relora_train.cli.watch import run_view
from relora_train.runs.metrics import stored_metrics, with_running
from relora_train.runs.reporting import RunReporter
from relora_train.runs.survey import survey_runs
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """Columns and rows of the dots of a curve, without its labels."""
    order = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]  # of the bits in Unicode's block
    return {
        (2 * at + x, 4 * number + y)
        for number, line in enumerate(lines)
        for at, char in enumerate(line[9:])
        if "\u2800" <= char <= "\u28ff"
        for bit, (x, y) in enumerate(order)
        if (ord(char) - 0x2800) >> bit & 1
    }


def test_a_curve_joins_its_points_from_corner_to_corner():
    lines = curve([(0, 1.0), (100, 5.0)], width=29, height=5, span=(0, 100))
    drawn = dots(lines)
    assert len(lines) == 5 and lines[0].startswith("       5 ") and lines[-1].startswith("       1 ")
    assert (0, 19) in drawn and (39, 0) in drawn and {x for x, _ in drawn} == set(range(40))
    assert all(abs((39 - x) / 39 * 19 - y) <= 1 for x, y in drawn)


def test_a_jump_is_drawn_whole_and_what_is_not_finite_or_lies_outside_is_left_out():
    points = [(0, 0.0), (50, 0.0), (51, 3.0), (100, 3.0), (60, float("nan")), (70, float("inf")), (300, 3.0)]
    drawn = dots(curve(points, width=29, height=2, span=(0, 100)))
    assert {y for x, y in drawn if x in (20, 21)} == set(range(8)) and max(x for x, _ in drawn) == 39


def test_a_mark_stands_where_no_dot_does_and_no_points_are_no_curve():
    lines = curve([(0, 1.0), (100, 1.0)], width=29, height=3, span=(0, 100), marks=[50])
    assert [line[9:].find(MARK) for line in lines] == [10, -1, 10]
    assert curve([], width=20, height=2, span=(0, 1)) == ["", ""]
    assert axis((0, 470), width=40) == f"    step 0{'470':>30}"


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[CheckpointRef]:
    """The warm start and first cycle of a run 'tale' in the default store."""
    monkeypatch.setenv("RELORA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return commit_run(open_store(tmp_path / "store"), "tale", synthetic_profile(), tmp_path / "s", stages=STAGES[:2])


def run_metrics(store: ObjectStore, run_id: str) -> list[dict[str, Any]]:
    return with_running(stored_metrics(store, run_id), run_id, read_status(store, run_id))


def tell(stage: str = "cycle-2", steps: range = range(81, 91), end_step: int = 120) -> None:
    """Say what a trainer says of a stage's first steps."""
    events.emit("stage_started", stage=stage, start_step=steps[0] - 1, end_step=end_step)
    scores = {"val_loss": 4.0, "val_perplexity": 54.6, "bits_per_byte": 1.0}
    events.emit("evaluation", stage=stage, step=steps[0] - 1, when="before", **scores)
    for step in steps:
        events.emit(**{**progress(step, 300 / step, stage), "start_step": steps[0] - 1, "end_step": end_step})


def training(store: ObjectStore) -> RunReporter:
    return RunReporter(store, "tale", "synthetic", STAGES, every_seconds=0)


def test_metrics_are_those_of_the_line_and_of_the_running_stage(line: list[CheckpointRef], tmp_path: Path, relora: Any):
    store = open_store(tmp_path / "store")
    with training(store):
        tell()
    records = json.loads(relora("metrics", "tale", "--json").out)
    of_stages = [[one for one in records if one["stage"] == stage] for stage in ("warm-start", "cycle-1", "cycle-2")]
    assert sum(map(len, of_stages)) == len(records) and [len(one) for one in of_stages] == [41, 41, 11]
    stored = (tmp_path / "store" / line[0].prefix / "metrics.jsonl").read_text().splitlines()
    assert [{"run_id": "tale", "stage": "warm-start", **json.loads(each)} for each in stored] == of_stages[0]
    assert [(one["kind"], one["step"]) for one in of_stages[2]][:2] == [("evaluation", 80), ("train", 81)]
    rows = list(csv.DictReader(io.StringIO(relora("metrics", "tale").out)))
    assert [(row["stage"], int(row["step"]), row["loss"]) for row in rows] == [
        (one["stage"], one["step"], str(one.get("loss", ""))) for one in records
    ]
    with training(store):  # the very stage that is stored: its records are those of the store
        tell("cycle-1", range(41, 51), 80)
    assert len(run_metrics(store, "tale")) == 82 + 11


def test_metrics_and_watch_of_a_run_that_is_not_there_name_those_that_are(line: list[CheckpointRef], relora: Any):
    for command in ("metrics", "watch"):
        said = relora(command, "tail")
        assert said.code == 6 and "tale" in said.err


def test_a_name_that_is_no_run_id_is_refused_and_a_run_without_a_checkpoint_said_to_have_none_yet(
    line: list[CheckpointRef], tmp_path: Path, relora: Any
):
    for command in ("metrics", "watch"):
        for name in ("tale@latest", "", "../tale"):
            said = relora(command, name)
            assert said.code == 2 and f"'{name}' is not a valid run id" in said.err
    with RunReporter(open_store(tmp_path / "store"), "fresh", "synthetic", STAGES, every_seconds=0):
        tell("warm-start", range(1, 11), 40)
    assert relora("metrics", "fresh").code == 0
    for command in ("show", "report"):
        said = relora(command, "fresh")
        assert said.code == 6 and "Run 'fresh'" in said.err
        assert "has no checkpoint yet. `relora watch fresh` shows how far it is." in " ".join(said.err.split())


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("height", [18, 24, 50])
def test_the_picture_fits_a_terminal_and_has_no_control_codes(
    line: list[CheckpointRef], tmp_path: Path, width: int, height: int
):
    store = open_store(tmp_path / "store")
    with hold_run(store, "tale"), training(store):
        tell()
        events.emit("retrying", task="t", message="The disk is full. " * 20, retry=1, retries=2, seconds=1)
        deadline = time.monotonic() + 60
        while survey_runs(store)[0].state != "waiting" and time.monotonic() < deadline:
            time.sleep(0.01)
        [run] = survey_runs(store)
    written = io.StringIO()
    show(Console(file=written, width=width), run_view(run, run_metrics(store, "tale"), width=width, height=height))
    lines = written.getvalue().splitlines()
    assert len(lines) <= height and written.getvalue().replace("\n", "").isprintable()
    bar, *_ = [text for text in lines if "steps" in text]
    assert all(len(text) <= width for text in lines if "disk" not in text and "tale" not in text)
    assert "tale  waiting to retry, cycle-2, held by process" in lines[0] and "90 of 160 steps" in bar
    assert any(text.startswith("cycle-2: perplexity 54.60") for text in lines)


def watching(*options: str, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "relora_train.cli.app", "watch", "tale", "--every", "0.2", *options]
    return subprocess.Popen(command, text=True, **how)


def test_a_watch_in_another_process_follows_a_run_to_its_end(line: list[CheckpointRef], tmp_path: Path):
    store = open_store(tmp_path / "store")
    with hold_run(store, "tale"), training(store):
        tell(steps=range(81, 91))
        watcher = watching(stdout=subprocess.PIPE)
        assert watcher.stdout is not None
        assert watcher.stdout.readline().startswith("tale  running, cycle-2  90/120  loss 3.333")
        tell(steps=range(91, 111))
        while "  110/120  " not in watcher.stdout.readline():
            pass
        events.emit("retrying", task="t", message="Away.", retry=1, retries=2, seconds=1)
        assert watcher.stdout.readline() == "tale  waiting to retry, cycle-2  Away.\n"
        tell("cycle-3", range(121, 141), 160)
        while not watcher.stdout.readline().startswith("tale  running, cycle-3  140/160"):
            pass
    rest, _ = watcher.communicate(timeout=60)
    assert rest.splitlines()[-1] == "tale  done, cycle-1" and watcher.returncode == 0


def test_a_live_watch_on_a_terminal_ends_quietly_by_ctrl_c(line: list[CheckpointRef], tmp_path: Path):
    store = open_store(tmp_path / "store")
    ours, theirs = pty.openpty()
    with hold_run(store, "tale"), training(store):
        tell()
        with watching(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as watcher:
            os.close(theirs)
            seen = ""
            while "90 of 160 steps" not in seen:
                assert select.select([ours], [], [], 60)[0], seen
                seen += os.read(ours, 1 << 16).decode(errors="replace")
            watcher.send_signal(signal.SIGINT)
            try:
                while chunk := os.read(ours, 1 << 16):
                    seen += chunk.decode(errors="replace")
            except OSError:  # Linux says so of a terminal whose last user has gone
                pass
            assert watcher.wait(60) == 0
    os.close(ours)
    assert "Stopped" not in seen and "Traceback" not in seen and seen.count("learning rate") >= 1
