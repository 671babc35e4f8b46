"""What people see is whole and can be copied: at any width of a terminal, piped, and after Ctrl-C."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prefect_operator import ROOT, wait_for
from prefect_server import QUIET
from rich.text import Text

from relora_train.checkpoints.layout import parse_snapshot_name
from relora_train.cli.output import CellTable, _HarmlessConsole, samples_lines, show, table

NAME = "step-00000020-f2f3e673a954"
COLUMNS = ("stage", "steps", "tokens", "perplexity", "bits/byte", "time", "checkpoint")
ROW = ("warm-start", "1–20", "10.24K", "511.41 → 216.98", "3.81 → 3.29", "0.7s", NAME)


def stages(rows: int = 3) -> CellTable:
    return table(COLUMNS, [ROW] * rows, left=("checkpoint",))


def printed(*parts: object, width: int) -> list[str]:
    file = io.StringIO()
    show(_HarmlessConsole(file=file, width=width), list(parts))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 88, 89, 100, 140, 200])
def test_names_and_numbers_are_whole_at_any_width(width: int):
    lines = printed(stages(), width=width)
    assert sum(line.rstrip().endswith(NAME) for line in lines) == 3 and max(map(len, lines)) <= width
    assert all("\n".join(lines).count(cell) >= 3 for cell in ROW)
    assert stages().fit(width) == (width >= 89) == (lines[0].split() == list(COLUMNS))


def test_prose_in_a_column_may_be_wrapped_and_a_long_address_may_not():
    prose = table(("what", "why"), [("a", "the data of that night were short of text " * 3)], left=("why",))
    assert prose.fit(60) and len(printed(prose, width=60)) > 4
    uri = "s3://bucket/prefix/runs/" + "r" * 80
    address = table(("what", "where"), [("a", uri)], left=("where",), title="Places")
    assert printed(address, width=60) == ["Places", "a", f"  where  {uri}"]


def test_a_mark_stands_before_the_name_of_its_block():
    marked = table(("", "stage", "checkpoint"), [("●", "cycle-1", NAME), (" ", "cycle-2", NAME)], left=("stage",))
    assert printed(marked, width=30) == [
        "● cycle-1", f"  checkpoint  {NAME}", "  cycle-2", f"  checkpoint  {NAME}",
    ]  # fmt: skip
    unmarked = table(("", "warm start", "cycle"), [("parameters", "1" * 20, "2" * 20)])
    assert printed(unmarked, width=30) == ["parameters", f"  warm start  {'1' * 20}", f"  cycle       {'2' * 20}"]


def test_no_word_is_broken_at_the_widths_at_which_columns_wrap():
    columns, row = (
        ("run", "profile", "score", "held by", "why"),
        ("one", "mine", "loss 4.86", "vm", "short of text that night"),
    )
    made = table(columns, [row], left=("profile", "held by", "why"))
    words = {word for cell in (*columns[1:], *row) for word in cell.split()}
    wrapped = 0
    for width in range(35, 70):
        lines = printed(made, width=width)
        assert words <= set(" ".join(lines).split()) and max(map(len, lines)) <= width, (width, lines)
        wrapped += made.fit(width) and len(lines) > 3
    assert wrapped == 22  # from 36, the longest words side by side, to 57, one less than the longest cells


def test_samples_are_indented_wrapped_and_without_spaces_at_the_ends_of_lines():
    record = {"samples": [{"prompt": "def main(", "text": "arl\n  x = 1  \n" + "word " * 40}]}
    lines = printed(*samples_lines(record), Text("end"), width=60)
    assert lines[:2] == ["    def main(arl", "      x = 1"] and lines[-1] == "end"
    assert all(line == line.rstrip() and len(line) <= 60 for line in lines)


def workers_of(parent: int) -> list[str]:
    """Command lines of the worker processes that a process started and that still run."""
    listed = subprocess.run(["ps", "-ewwo", "ppid=,args="], check=True, capture_output=True, text=True).stdout
    found = [line.split(maxsplit=1) for line in listed.splitlines()]
    return [command for owner, command in found if int(owner) == parent and "-m relora_train.worker " in command]


def test_ctrl_c_says_that_the_state_was_saved_and_what_to_type_and_quiet_says_nothing_else(tmp_path: Path):
    sets = (
        "schedule.warm_start_steps=0",
        "schedule.cycles=1",
        "schedule.cycle_length=200000",
        "snapshots.every_steps=5",
        "launch.threads=1",
    )
    asked = ["run", "smoke", "--run-id", "stopped", "--quiet", *(part for one in sets for part in ("--set", one))]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {
        **ours, **QUIET, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect"),
        "RELORA_STORE": str(tmp_path / "store"), "RELORA_CACHE": str(tmp_path / "cache"), "COLUMNS": "60",
    }  # fmt: skip
    del environment["PREFECT_LOGGING_LEVEL"]
    snapshots = tmp_path / "store" / "runs" / "stopped" / "snapshots"

    def saved() -> list[int]:
        names = [parse_snapshot_name(path.parent.name) for path in snapshots.rglob("manifest.json")]
        return sorted(step for step in names if step is not None)

    with subprocess.Popen(
        [sys.executable, "-m", "relora_train.cli.app", *asked], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: saved() or process.poll() is not None, 240, lambda: "no snapshot")
            assert len(workers_of(process.pid)) == 1  # the one that was started ahead trains
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, ""), err
    (told,) = err.splitlines()
    found = re.fullmatch(
        r"Stopped by Ctrl-C\. The state of cycle-1 at step (\d+) is saved\. To go on, type: (.*)", told
    )
    assert found and found[2] == " ".join(["relora", *asked]), told
    assert int(found[1]) == saved()[-1]
