"""Everything that only a GPU can answer, in one command: `python tests/gpu/acceptance.py --minutes 8`.

This process owns the clock, the file of results and the processes in which checks run; it never imports torch. A check
that raises, hangs or kills its process is told of, and the next goes on in a fresh process. --dry-run-cpu runs the same
code on tiny models of a CPU and judges nothing that only a GPU can show.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent), str(HERE.parents[1])) if path not in sys.path]

from check_process import CheckProcess  # noqa: E402
from checks import CHECKS, Check  # noqa: E402

PACKAGES = ("relora-train", "torch", "triton", "transformers", "numpy", "safetensors", "peft", "liger-kernel")
START_SECONDS = 10.0
"""The start of a process: it imports torch and transformers."""

LEAST_LIMIT = 20.0
"""Seconds that every check may take: to stop a slow one costs a start."""

DRY_RUN_LIMIT = 300.0
RESERVE_SECONDS = 60.0


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, help="time for all of it; 8, or any in a dry run")
    parser.add_argument("--out", type=Path, default=Path("gpu-acceptance.json"))
    parser.add_argument("--only", type=ids, default=(), help="comma-separated: checks (A2) or groups (B)")
    parser.add_argument("--skip", type=ids, default=())
    parser.add_argument("--fail-fast", action="store_true", help="run nothing after the first fault")
    parser.add_argument("--dry-run-cpu", action="store_true", help="the same code on tiny models, without a GPU")
    parser.add_argument("--scratch", type=Path, help="directory for checkpoints, 40 GB; the system's temporary one")
    options = parser.parse_args(argv)
    if options.minutes is None:
        options.minutes = math.inf if options.dry_run_cpu else 8.0
    return options


def ids(text: str) -> tuple[str, ...]:
    return tuple(part.strip().upper() for part in text.split(",") if part.strip())


def main(
    argv: Sequence[str] | None = None,
    *,
    checks: Sequence[Check] = CHECKS,
    start_seconds: float = START_SECONDS,
    least_limit: float = LEAST_LIMIT,
) -> int:
    """Run the checks; return 0 if none failed, was in error or ran out of time, 130 if interrupted."""
    options = options_of(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a machine that is taken away leaves its results
    results = Results(options.out, sys.argv if argv is None else [__file__, *argv])
    scratch = Path(tempfile.mkdtemp(prefix="acceptance-", dir=options.scratch))
    try:
        acceptance = Acceptance(options, results, scratch, start_seconds, least_limit)
        acceptance.run([check for check in checks if is_wanted(check, options)])
    except KeyboardInterrupt:
        results.interrupt()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sys.stdout.write(summary(results.checks) + f"\nresults: {options.out.resolve()}\n")
    bad = [entry for entry in results.checks if entry["status"] in ("fail", "error", "timeout")]
    return 130 if results.was_interrupted else int(bool(bad))


def is_wanted(check: Check, options: argparse.Namespace) -> bool:
    names = {check.id, check.id[0]}
    return (not options.only or bool(names & {*options.only})) and not names & {*options.skip}


class Acceptance:
    """One run of the checks."""

    def __init__(
        self, options: argparse.Namespace, results: Results, scratch: Path, start_seconds: float, least_limit: float
    ) -> None:
        self._options, self._results, self._scratch = options, results, scratch
        self._start_seconds, self._least_limit = start_seconds, least_limit
        self._deadline = time.monotonic() + 60 * options.minutes
        self._process: CheckProcess | None = None
        self._group = ""

    def run(self, checks: Sequence[Check]) -> None:
        reason = ""
        try:
            for check in checks:
                if reason := reason or self._reason_to_stop():
                    self._results.skip(check, reason)
                elif lack := self._lack_of_time(check):
                    self._results.skip(check, lack)
                else:
                    self._run(check)
        except BaseException:
            if self._process is not None:
                self._process.kill()
            raise
        self._end_process()

    def _reason_to_stop(self) -> str:
        """Return why no check can follow the last one."""
        last = self._results.checks[-1] if self._results.checks else {}
        if self._options.fail_fast and last.get("status") in ("fail", "error", "timeout"):
            return f"fail-fast: {last['id']}"
        if last.get("measured", {}).get("usable_gpus") == 0 and not self._options.dry_run_cpu:
            return "no GPU that torch can use; see A0"
        return ""

    def _lack_of_time(self, check: Check) -> str:
        left = self._deadline - time.monotonic()
        needed = check.seconds + (0 if self._has_process_for(check) else self._start_seconds)
        if math.isinf(left) or (needed <= left and (not check.reserve or left > RESERVE_SECONDS)):
            return ""
        return f"budget: {needed:.0f} s needed, {max(left, 0):.0f} s left"

    def _has_process_for(self, check: Check) -> bool:
        return self._process is not None and self._group == self._group_of(check)

    def _group_of(self, check: Check) -> str:
        return "all" if self._options.dry_run_cpu else check.group  # starts cost more than tiny checks

    def _run(self, check: Check) -> None:
        entry = self._results.begin(check)
        started = time.monotonic()
        if not self._has_process_for(check):
            self._end_process()
            self._process = CheckProcess(HERE / "child.py", self._scratch, dry=self._options.dry_run_cpu)
            self._group = self._group_of(check)
        process = self._process
        assert process is not None
        found = process.run(check.id, check.place, limit=self._limit(check), on_measured=entry.measured)
        if found.pop("broken"):
            process.kill()
            self._process = None
        entry.end(seconds=round(time.monotonic() - started, 2), **found)

    def _limit(self, check: Check) -> float:
        """Return the seconds after which the check is stopped: never after the end of the time for all."""
        if self._options.dry_run_cpu:
            return DRY_RUN_LIMIT
        left = max(self._deadline - time.monotonic(), 1.0)
        return min(max(3 * check.seconds, self._least_limit), left)

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


class Results:
    """The file of results, written anew whenever something is known."""

    def __init__(self, path: Path, argv: Sequence[str]) -> None:
        self._path = path
        self.checks: list[dict[str, Any]] = []
        self.was_interrupted = False
        self._head = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": {"node": platform.node(), "platform": platform.platform(), "cores": os.cpu_count()},
            "argv": list(argv),
            "git": git_state(),
            "versions": {"python": platform.python_version(), **versions()},
        }
        self.write()

    def begin(self, check: Check) -> Entry:
        self._add(check, status="running", seconds=0.0)
        return Entry(self, self.checks[-1])

    def skip(self, check: Check, reason: str) -> None:
        self._add(check, status="skipped", seconds=0.0, error=reason)
        tell(self.checks[-1])

    def interrupt(self) -> None:
        self.was_interrupted = True
        for entry in self.checks:
            if entry["status"] == "running":
                entry |= {"status": "skipped", "error": "interrupted"}
        self.write()

    def _add(self, check: Check, **fields: Any) -> None:
        known = {"id": check.id, "title": check.title, "criterion": check.criterion}
        self.checks.append({**known, "measured": {}, "error": None, "traceback": None, **fields})
        self.write()

    def write(self) -> None:
        """Write the whole file or nothing: it may be all that is left of a machine."""
        part = self._path.with_name(f".{self._path.name}.part")
        with part.open("w") as file:
            json.dump({**self._head, "checks": self.checks}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)


class Entry:
    """The result of the check that is running."""

    def __init__(self, results: Results, record: dict[str, Any]) -> None:
        self._results, self._record = results, record

    def measured(self, values: dict[str, Any]) -> None:
        """Note a part, which stays known if the check does not end."""
        self._record["measured"] |= values
        self._results.write()

    def end(self, **fields: Any) -> None:
        self._record |= fields
        self._results.write()
        tell(self._record)


def tell(entry: dict[str, Any]) -> None:
    sys.stderr.write(f"{entry['id']:<4} {entry['status']:<8} {entry['seconds']:7.1f} s  {entry['title']}\n")


def summary(entries: Sequence[dict[str, Any]]) -> str:
    lines = ["", f"{'check':<5} {'status':<8} {'seconds':>8}  what"]
    for entry in entries:
        lines.append(f"{entry['id']:<5} {entry['status']:<8} {entry['seconds']:>8.1f}  {entry['title']}")
        notes = [entry["error"], *(f"not met: {text}" for text in entry.get("failed", ()))]
        notes += [f"finding: {text}" for text in entry.get("findings", ())]
        lines += [f"{'':<25}{note.splitlines()[0][:150]}" for note in notes if note]
    counts = {status: sum(entry["status"] == status for entry in entries) for status in STATUSES}
    return "\n".join([*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items() if count)])


STATUSES = ("pass", "fail", "error", "timeout", "skipped")


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
    except (OSError, subprocess.CalledProcessError):
        return {}


if __name__ == "__main__":
    sys.exit(main())
