"""What a run shows while it goes and at its end."""

import io
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from relora_train.cli.output import show
from relora_train.cli.progress import PLAIN_SECONDS, LiveDisplay, PlainDisplay, RunProgress
from relora_train.cli.run import closing_lines, summary_view
from relora_train.runs.run import RunSummary, StageSummary


def stage_events(stage: str, start: int, end: int) -> Iterator[tuple[float, dict[str, Any]]]:
    """Events of a stage with the seconds since it began: two steps a second."""
    place = {"stage": stage, "start_step": start, "end_step": end}
    yield 0, {"event": "stage_started", **place, "device": "cpu", "parameters": 9, "trainable_parameters": 5}
    yield 0, {"event": "evaluation", "stage": stage, "step": start, "when": "before", "val_perplexity": 120.0}
    for step in range(start + 1, end + 1):
        numbers = {"loss": 5.0, "learning_rate": 1e-3, "tokens_per_second": 1e4, "eta_seconds": 3.0}
        yield (step - start) / 2, {"event": "progress", **place, "step": step, **numbers}
    if stage != "warm-start":
        report = {"max_relative_output_change": 3.1e-7, "relative_update_norm": 0.0521, "effective_rank": 6.6}
        yield (
            end / 2,
            {"event": "merge", "stage": stage, "step": end, "cycle": 12, **report, "optimizer_state_zeroed": 0.99},
        )
    done = {"stage": stage, "step": end, "uri": "file:///x", "seconds": 61.0, "val_perplexity": 98.5}
    yield end / 2, {"event": "stage_finished", **done}


def test_plain_progress_is_lines_at_a_bounded_rate_without_control_codes() -> None:
    written, now = io.StringIO(), 0.0
    console = Console(file=written, width=100, force_terminal=False)
    progress = RunProgress(PlainDisplay(console, clock=lambda: now), ["warm-start", "cycle-12"])
    for stage, start, end in (("warm-start", 0, 200), ("cycle-12", 200, 400)):
        begun = now
        for seconds, event in stage_events(stage, start, end):
            now = max(now, begun + seconds)
            progress.show(event)
    lines = written.getvalue().splitlines()
    steps = [text for text in lines if "%" in text and "merged" not in text]
    assert len(steps) == 2 * (100 / PLAIN_SECONDS - 1)  # 100 s a stage; the last step is told by the stage's end
    assert sum("merged cycle 12" in text for text in lines) == 1
    assert any("cycle-12: validation perplexity 120.00 → 98.50 in 1 min 01 s" in text for text in lines)
    assert all(text.isprintable() and len(text) <= 100 for text in lines)


@pytest.mark.parametrize("stored_first", [True, False])
def test_a_checkpoint_stored_beside_the_next_stage_is_one_quiet_line_after_its_stage(stored_first: bool) -> None:
    written = io.StringIO()
    progress = RunProgress(PlainDisplay(Console(file=written, width=100, force_terminal=False)), ["one", "two"])
    for stage in ("one", "two"):
        finished = {"event": "stage_finished", "stage": stage, "uri": None, "seconds": 61.0, "val_perplexity": 98.5}
        stored = {"event": "checkpoint_stored", "stage": stage, "uri": "s3://x", "seconds": 2.0}
        for event in (stored, finished) if stored_first else (finished, stored):
            progress.show(event)
    said = [line.partition(":")[0] + line[-8:] * ("stored" in line) for line in written.getvalue().splitlines()]
    assert said == ["✓ one", "↑ one: stored", "✓ two", "↑ two: stored"]


def test_the_progress_of_an_experiment_says_which_run_it_is_and_each_thing_once() -> None:
    written = io.StringIO()
    progress = RunProgress(PlainDisplay(Console(file=written, width=100, force_terminal=False)), [])
    dataset = {"event": "dataset_ready", "uri": "file:///d", "name": "d", "train_tokens": 9, "val_tokens": 1}
    progress.show({"event": "arm_reused", "arm": "full", "seed": 0, "outcome": "trained", "val_perplexity": 98.3})
    progress.show({"event": "arm_reused", "arm": "lora", "seed": 0, "outcome": "diverged", "val_perplexity": None})
    for seed in (0, 1):
        run = {"arm": "relora", "seed": seed, "run_id": f"tiny-relora-s{seed}-12345678", "stages": ["cycle-1"]}
        progress.show({"event": "arm_started", **run})
        progress.show({**dataset, "reused": seed == 1})
    message = "The training loss is nan at step 83 of stage cycle-1 (learning rate 1): the run diverged and …"
    progress.show({"event": "arm_diverged", "arm": "relora", "seed": 1, "message": message})
    assert written.getvalue().splitlines() == [
        "○ reused full, seed 0: validation perplexity 98.30",
        "○ reused lora, seed 0: diverged",
        "› relora, seed 0: run tiny-relora-s0-12345678",
        "✓ dataset d: 9 tokens to train on, 1 to validate on",
        "› relora, seed 1: run tiny-relora-s1-12345678",
        "! relora, seed 1 diverged: The training loss is nan at step 83 of stage cycle-1 (learning rate 1)",
    ]


def test_the_live_display_keeps_what_is_done_and_removes_its_bar() -> None:
    written = io.StringIO()
    console = Console(file=written, width=100, force_terminal=True, force_interactive=True, color_system=None)
    display = LiveDisplay(console)
    progress = RunProgress(display, ["warm-start", "cycle-12"])
    try:
        for _, event in stage_events("cycle-12", 200, 210):
            progress.show(event)
            display.refresh()
    finally:
        display.close()
    assert "205/210" in written.getvalue()
    assert written.getvalue().rstrip().endswith("\x1b[2K"), "the last line was not erased"


@pytest.mark.parametrize("width", [60, 79, 80, 100])
def test_the_live_display_names_its_stage_at_any_width(width: int) -> None:
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, force_interactive=True, color_system=None)
    display = LiveDisplay(console)
    try:
        display.counted("cycle-12", 469, 20_000, "469/20,000  loss 3.222  17,741 tok/s  16 min 57 s left")
        display.refresh()
    finally:
        display.close()
    shown = written.getvalue()
    assert "cycle-12" in shown and "469/20,000  loss 3.222  17,741 tok/s" in shown
    assert (" 2% " in shown) == (width >= 80)
    for line in re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "\r", shown).splitlines():
        assert len(line) <= width - 4  # where a terminal writes ^C


def test_warnings_and_announced_retries_are_shown_and_what_is_told_otherwise_is_not() -> None:
    written = io.StringIO()
    progress = RunProgress(PlainDisplay(Console(file=written, width=100)), [])
    for level in (logging.INFO, logging.WARNING):
        progress.handle(logging.makeLogRecord({"msg": "%s left out\nand more", "args": (level,), "levelno": level}))
    failed = {"event": "retrying", "task": "read", "message": "Away. Wait.", "retry": 1, "retries": 3, "seconds": 15}
    progress.show(failed)
    assert written.getvalue().splitlines() == [
        "! 30 left out", "! read failed: Away. Retry 1 of 3 in about 15 s.",
    ]  # fmt: skip


def test_a_display_never_stops_a_run() -> None:
    progress = RunProgress(PlainDisplay(Console(file=io.StringIO())), [])
    for event in ({"event": "progress"}, {"event": "unheard-of"}, {}):
        record = logging.makeLogRecord({"event": event})
        progress.handle(record)


def summary(*, reused: bool) -> RunSummary:
    place = "s3://a-bucket-with-a-long-name/and/a/long/prefix"
    scores = {"val_perplexity": 123.45, "bits_per_byte": 1.23}
    before = {"val_perplexity_before": 1234.56, "bits_per_byte_before": 2.34}
    stages = tuple(
        StageSummary(
            stage=name, start_step=start, end_step=start + 5000, tokens=768_000_000, evaluation=scores | before,
            seconds=12_345.0, uri=f"{place}/runs/a-run/checkpoints/step-{start + 5000:08d}-0123456789ab", reused=reused,
        )
        for name, start in (("warm-start", 0), ("cycle-1", 5000), ("cycle-2", 10_000))
    )  # fmt: skip
    samples = [{"prompt": "def ", "text": "f(\x1b[2J):\n    x"}]
    return RunSummary(
        run_id="a-run", store_uri=place, dataset_uri=f"{place}/datasets/d/0", dataset_reused=reused, stages=stages,
        evaluations=({"stage": "cycle-2", "val_perplexity": 120.0, "samples": samples},),
        evaluations_reused=int(reused), report_uri=f"{place}/runs/a-run/report/report.html",
        picture_uris=(f"{place}/runs/a-run/report/loss.png",),
    )  # fmt: skip


def test_the_final_table_fits_100_columns_and_says_where_everything_is() -> None:
    written = io.StringIO()
    show(Console(file=written, width=100), summary_view(summary(reused=True), 7.0))
    shown = written.getvalue()
    assert all(len(text) <= 100 for text in shown.splitlines())
    for words in (
        "Checkpoints in s3://a-bucket-with-a-long-name/and/a/long/prefix/runs/a-run/checkpoints",
        "step-00015000-0123456789ab",
        "1,235 → 123.45",
        "Reused: dataset, 3 stages, 1 evaluation",
        "Report: s3://",
        "finished in 7.0 s",
    ):
        assert words in shown
    assert "\x1b" not in shown, "a model's text reached the terminal as a control code"
    assert not any("Reused" in line for line in closing_lines(summary(reused=False), seconds=7.0))
