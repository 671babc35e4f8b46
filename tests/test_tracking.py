"""Trackers are told of a run by their own clients, and what goes wrong with them is nobody else's trouble."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracked import of_tensorboard, of_trackio, of_wandb

from relora_train import events
from relora_train.errors import ConfigError
from relora_train.events import Event
from relora_train.runs import tracking
from relora_train.runs.trackers import Point, Start, system_numbers
from relora_train.runs.tracking import EventReader, Tracking, check_trackers
from relora_train.settings.profile import Profile, default_run_id
from relora_train.settings.tracking import TrackingConfig

SAMPLE = {"prompt": "a <b>", "text": " c"}
SCORES = {"val_loss": 2.0, "val_perplexity": 7.4, "bits_per_byte": 0.9, "val_tokens": 100}


def profile(directory: Path, *names: str) -> Profile:
    return Profile(tracking=TrackingConfig(to=names, directory=str(directory)))  # type: ignore[arg-type]


def stage(name: str, start: int, steps: range, end: int, *, merged: int | None = None) -> list[Event]:
    """The events that a flow hears of a stage that goes on at the first of these steps."""
    place = {"stage": name, "start_step": start, "end_step": end}
    told: list[Event] = [{"event": "stage_started", **place, "pid": os.getpid(), "device": "cpu"}]
    if steps[0] > start + 1:
        told.append({"event": "resumed", "stage": name, "step": steps[0] - 1, "snapshot": "x"})
    told.append({"event": "evaluation", "stage": name, "step": start, "when": "before", **SCORES})
    for step in steps:
        numbers = {"loss": 10.0 / step, "learning_rate": 1e-3, "tokens_per_second": 5.0, "data_wait_share": 0.0}
        told.append({"event": "progress", **place, "step": step, **numbers, "eta_seconds": 1.0})
    if steps[-1] == end:
        report = {"relative_update_norm": 0.5, "effective_rank": 3.0}
        told += [{"event": "merge", "stage": name, "step": end, "cycle": merged, **report}] if merged else []
        told.append({"event": "evaluation", "stage": name, "step": end, "when": "after", **SCORES})
    return told


def track(run_id: str, settings: Profile, told: list[Event]) -> None:
    with Tracking(run_id, settings):
        for event in told:
            events.emit(**event)


@pytest.fixture
def told_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of all trackers of a run that was stopped at step 24 and went on from the snapshot of step 20."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "_END_SECONDS", 300.0)  # a machine may be slow, and this is about what is told
    settings = profile(tmp_path, "trackio", "tensorboard", "wandb")
    track("tale", settings, stage("warm-start", 0, range(1, 11), 10) + stage("cycle-1", 10, range(11, 25), 30))
    again = stage("cycle-1", 10, range(21, 31), 30, merged=1)
    track(
        "tale",
        settings,
        [*again, {"event": "evaluated", "stage": "warm-start", "reused": False, "samples": [SAMPLE], **SCORES}],
    )
    return tmp_path


def test_every_tracker_has_one_curve_of_a_run_that_was_stopped_and_resumed(told_twice: Path):
    read = of_trackio(told_twice), of_tensorboard(told_twice, "tale"), of_wandb(told_twice, "tale")
    for told in read:
        assert [step for step, _ in told["train/loss"]] == list(range(1, 31))
        assert [value for _, value in told["train/loss"]] == pytest.approx([10.0 / step for step in range(1, 31)])
        assert told["train/learning_rate"][-1] == (30, pytest.approx(1e-3))
        assert [step for step, _ in told["evaluation/val_loss"]] == [0, 10, 30]
        assert told["merge/effective_rank"] == [(30, 3.0)]
        assert told["checkpoints/warm-start/val_loss"] == [(30, 2.0)]  # scored at the end, beside the last step
        assert [name for name in told if name.startswith("stages/")] == ["stages/warm-start", "stages/cycle-1"]
        assert "events/resumed" in told and told["system/load_1m"]
        assert told["system/trainer_memory_bytes"][0][1] > 1e6
    assert read[0]["samples/warm-start"] == read[1]["samples/warm-start"] == [(30, "a <b> c")]
    [page] = (told_twice / "wandb").rglob("media/html/samples/*.html")
    assert "<pre>a &lt;b&gt; c</pre>" in page.read_text()


def test_two_trackers_fail_and_the_third_is_told_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    """One cannot be imported, and the directory of one is a file."""
    monkeypatch.setattr(tracking, "_END_SECONDS", 300.0)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "wandb.py").write_text("raise ModuleNotFoundError('no wandb')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    (tmp_path / "tensorboard").write_text("in the way")
    track("tale", profile(tmp_path, "wandb", "tensorboard", "trackio"), stage("warm-start", 0, range(1, 11), 10))
    assert [step for step, _ in of_trackio(tmp_path)["train/loss"]] == list(range(1, 11))
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2 and all("goes on without it" in message for message in warnings)
    assert any(message.startswith("wandb") and "pip install 'relora-train[wandb]'" in message for message in warnings)


def test_a_tracker_that_hangs_holds_up_neither_events_nor_for_long_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "trackio.py").write_text("import time\ntime.sleep(3000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    monkeypatch.setattr(tracking, "_END_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "_QUEUED", 50)
    hung = Tracking("tale", profile(tmp_path, "trackio"))
    with hung:
        for event in stage("warm-start", 0, range(1, 5001), 5001):
            events.emit(**event)
    hung._thread.join(60)
    assert not hung._thread.is_alive(), "its process was not ended"
    assert "took too long" in caplog.text


def test_points_go_forward_and_say_each_loss_once():
    reader = EventReader()
    told = stage("warm-start", 0, range(1, 4), 3) + stage("cycle-1", 3, range(4, 6), 6)
    told += [told[-1], {"event": "unheard-of", "step": 99}, {"event": "evaluation", **SCORES}]
    points = [point for event in told for point in reader.points(event)]
    steps = [point.step for point in points]
    assert steps == sorted(steps) and [
        step for step, point in zip(steps, points, strict=True) if "train/loss" in point.numbers
    ] == [1, 2, 3, 4, 5]
    assert [point.step for point in points if "evaluation/val_loss" in point.numbers] == [0, 3]
    names = {name for point in points for name in point.numbers}
    assert names == {
        *(f"train/{name}" for name in ("loss", "learning_rate", "tokens_per_second", "data_wait_share")),
        *(f"evaluation/{name}" for name in SCORES),
    }


def test_a_run_without_the_section_starts_nothing_and_the_section_names_no_other_run(tmp_path: Path):
    quiet = Tracking("tale", Profile())
    with quiet:
        events.emit("stage_started", stage="a", start_step=0, end_step=1)
    assert not quiet._thread.is_alive() and quiet._thread.ident is None and quiet._points.empty()
    assert default_run_id(Profile()) == default_run_id(profile(tmp_path, "wandb"))


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "wandb" else object())
    check_trackers(profile(tmp_path, "trackio"))
    check_trackers(Profile())
    with pytest.raises(ConfigError, match=r"relora-train\[wandb\]"):
        check_trackers(profile(tmp_path, "trackio", "wandb"))


def test_gpus_are_named_by_what_nvidia_smi_says_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '87, 40536'\necho '[N/A], 12'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    numbers = system_numbers(None)
    gpus = {name: value for name, value in numbers.items() if "gpu" in name}
    assert gpus == {"system/gpu0_utilization_gpu": 87, "system/gpu0_memory_used": 40536, "system/gpu1_memory_used": 12}


def test_the_process_ends_with_its_input_whatever_became_of_the_flow(tmp_path: Path):
    start = Start(run_id="tale", project="p", trackers=("tensorboard",), directory=tmp_path, settings={})
    process = subprocess.Popen(
        [sys.executable, "-m", "relora_train.runs.trackers"], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(f"{start.model_dump_json()}\n{Point(step=3, numbers={'x': 1.0}).model_dump_json()}\n")
    process.stdin.close()  # as a kill of the flow does
    assert process.wait(120) == 0 and of_tensorboard(tmp_path, "tale")["x"] == [(3, 1.0)]
