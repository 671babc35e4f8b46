"""The script that a GPU is tried with works before there is one: the same code on a CPU, and whatever a check does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_launch import wait_until_gone

GPU = Path(__file__).resolve().parent / "gpu"

MADE_UP = """
import os, signal, subprocess, time
from check_run import SkippedError

def passes(run):
    run.record(pid=os.getpid())
    run.require('one is one', True)

def raises(run):
    run.record(pid=os.getpid(), before=1.5)
    raise ValueError('made up')

def hangs(run):
    run.record(pid=os.getpid(), child=subprocess.Popen(['sleep', '600']).pid)
    time.sleep(600)

def dies(run):
    run.record(pid=os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)

def fails(run):
    run.below('two', 2.0, 1.0)

def is_skipped(run):
    raise SkippedError('not here')

def finds(run):
    run.expect('it could be faster', False)
"""

PROGRAM = """
import sys
import acceptance
from checks import Check
checks = [Check(f'T{n}', name, seconds, f'made_up.{name}', 'made up') for n, (name, seconds) in enumerate(CHECKS)]
code = acceptance.main(OPTIONS, checks=checks, start_seconds=0.0, least_limit=1.0)
assert 'torch' not in sys.modules
sys.exit(code)
"""


class MadeUp:
    """A run of made-up checks T0, T1, … by name and estimate."""

    def __init__(self, directory: Path, *options: str, **checks: float) -> None:
        (directory / "made_up.py").write_text(MADE_UP)
        self.out = directory / "results.json"
        options = ("--out", str(self.out), "--scratch", str(directory), *options)
        program = PROGRAM.replace("CHECKS", repr(list(checks.items()))).replace("OPTIONS", repr(list(options)))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (directory, GPU)))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def results(self) -> dict[str, dict[str, Any]]:
        return {e["title"]: e for e in json.loads(self.out.read_text())["checks"]} if self.out.exists() else {}

    def ended(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=120)
        return self.process.returncode, said


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The dry run of all checks, and its file."""
    out = tmp_path_factory.mktemp("dry") / "results.json"
    command = [sys.executable, str(GPU / "acceptance.py"), "--dry-run-cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done, json.loads(out.read_text())


@pytest.mark.timeout(1800)  # a machine with other work
def test_the_dry_run_has_a_result_of_every_check_and_none_at_fault(
    dry: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
):
    done, file = dry
    listed = subprocess.run(
        [
            sys.executable,
            "-c",
            "from checks import CHECKS; import sys; sys.stdout.write(' '.join(c.id for c in CHECKS))",
        ],
        cwd=GPU,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [entry["id"] for entry in file["checks"]] == listed
    at_fault = [entry for entry in file["checks"] if entry["status"] not in ("pass", "skipped")]
    assert not at_fault, json.dumps(at_fault, indent=1)[:5000]
    assert done.returncode == 0, done.stdout + done.stderr
    assert file.keys() >= {"started", "host", "argv", "git", "versions", "checks"} and file["versions"]["torch"]


@pytest.mark.timeout(1800)
def test_a_dry_run_runs_all_code_and_says_what_it_cannot_judge(
    dry: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
):
    checks = {entry["id"]: entry for entry in dry[1]["checks"]}
    judged = {id for id, entry in checks.items() if entry["status"] == "pass"}
    assert judged >= {
        "A1",
        "A2",
        "A3",
        "A5",
        "A6",
        "A7",
        "A8",
        "A9",
        "A10",
        "A11",
        "A12",
        "A13",
        "B5",
        "B9",
        "B10",
        "C0",
        "C1",
        "C2",
        "C3",
        "C5",
    }
    for id, entry in checks.items():
        assert entry["measured"], id
        assert entry["status"] == "pass" or (entry["not_judged"] or entry["criterion"] == "recorded"), id


def test_a_check_that_raises_hangs_or_dies_is_told_of_and_the_next_goes_on(tmp_path: Path):
    made_up = MadeUp(tmp_path, raises=1, hangs=0.3, dies=1, fails=1, is_skipped=1, finds=1, passes=1)
    code, said = made_up.ended()
    found = made_up.results()
    assert {id: entry["status"] for id, entry in found.items()} == {
        "raises": "error",
        "hangs": "timeout",
        "dies": "error",
        "fails": "fail",
        "is_skipped": "skipped",
        "finds": "pass",
        "passes": "pass",
    }, said
    assert code == 1
    assert found["raises"]["error"] == "ValueError: made up" and "made_up.py" in found["raises"]["traceback"]
    assert found["raises"]["measured"]["before"] == 1.5
    assert "not done after 1.0 s" in found["hangs"]["error"] and "in hangs" in found["hangs"]["traceback"]
    wait_until_gone(found["hangs"]["measured"]["child"])
    assert "killed by SIGKILL" in found["dies"]["error"]
    assert found["fails"]["failed"] == ["two: 2 is not below 1"] and found["fails"]["measured"]["two"]["value"] == 2.0
    assert found["is_skipped"]["error"] == "not here" and found["finds"]["findings"] == ["it could be faster"]
    pids = [found[id]["measured"]["pid"] for id in ("raises", "hangs", "dies", "passes")]
    assert pids[0] == pids[1] and len(set(pids)) == 3  # a fresh process after each that was lost, and no other
    assert "not met: two: 2 is not below 1" in said and "2 error, 1 timeout" in said


def test_a_check_that_does_not_fit_into_the_time_left_is_skipped_and_a_shorter_one_is_not(tmp_path: Path):
    made_up = MadeUp(tmp_path, "--minutes", "1", passes=1, raises=100)
    assert made_up.ended()[0] == 0
    found = made_up.results()
    assert found["passes"]["status"] == "pass"
    assert found["raises"]["status"] == "skipped" and found["raises"]["error"].startswith("budget: 100 s needed")


def test_no_check_goes_on_after_the_end_of_the_time_for_all(tmp_path: Path):
    made_up = MadeUp(tmp_path, "--minutes", "0.1", hangs=2.5)
    assert made_up.ended()[0] == 1
    found = made_up.results()["hangs"]
    assert found["status"] == "timeout"
    assert float(found["error"].split()[3]) <= 6 < 3 * 2.5  # the time left, not three times the estimate


def test_only_and_skip_choose_and_fail_fast_ends(tmp_path: Path):
    made_up = MadeUp(tmp_path, "--fail-fast", "--only", "T", "--skip", "t0", dies=1, fails=1, passes=1)
    assert made_up.ended()[0] == 1
    found = made_up.results()
    assert list(found) == ["fails", "passes"]
    assert found["passes"]["status"] == "skipped" and found["passes"]["error"] == "fail-fast: T1"
    made_up = MadeUp(tmp_path, "--only", "T2,T7", dies=1, fails=1, passes=1)
    assert made_up.ended()[0] == 0 and list(made_up.results()) == ["passes"]


def test_an_interrupted_run_keeps_what_it_knows_and_ends_its_processes(tmp_path: Path):
    made_up = MadeUp(tmp_path, passes=1, hangs=100)
    while "child" not in made_up.results().get("hangs", {}).get("measured", {}):
        assert made_up.process.poll() is None
        time.sleep(0.05)
    made_up.process.send_signal(signal.SIGTERM)
    code, said = made_up.ended()
    found = made_up.results()
    assert code == 130 and found["passes"]["status"] == "pass" and "interrupted" in said
    assert found["hangs"]["status"] == "skipped" and found["hangs"]["error"] == "interrupted"
    wait_until_gone(found["hangs"]["measured"]["pid"])
    wait_until_gone(found["hangs"]["measured"]["child"])
