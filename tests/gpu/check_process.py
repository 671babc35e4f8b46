"""The process of a group of checks as acceptance.py sees it: one check at a time, each with a limit. Light."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_LIMIT = 180.0
"""Seconds within which a process must have imported torch, also from a cold disk."""

_CLOSE_SECONDS = 15.0
_TAIL = 6000


class CheckProcess:
    """A process that runs the checks it is told to. It answers on a pipe; what it prints goes to a file."""

    def __init__(self, program: Path, scratch: Path, *, dry: bool) -> None:
        answers, write_end = os.pipe()
        self._output = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (closed with the process)
        paths = [str(program.parent), str(program.parents[1]), str(program.parents[2]), os.environ.get("PYTHONPATH")]
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(write_end), str(scratch), "cpu" if dry else "cuda"],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end,),
            text=True,
            start_new_session=True,  # Ctrl-C reaches the parent alone
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                # configure_torch sets it too; here before anything has met cuBLAS.
                "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            },
        )
        os.close(write_end)
        self._heard: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(answers,), daemon=True).start()
        self._is_ready = False

    def run(
        self, check_id: str, place: str, *, limit: float, on_measured: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Return the fields of the check's result; `broken` is true if the process can run no other check."""
        if not self._is_ready:
            answer = self._next(time.monotonic() + START_LIMIT)
            if "ready" not in answer:
                return self._broken(answer, "in its start", START_LIMIT)
            self._is_ready = True
        deadline = time.monotonic() + limit
        with contextlib.suppress(BrokenPipeError):  # it has just died: its status will say how
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps([check_id, place]) + "\n")
            self._process.stdin.flush()
        while True:
            answer = self._next(deadline)
            if "measured" in answer:
                on_measured(answer["measured"])
            elif "status" in answer:
                return answer
            else:
                return self._broken(answer, "in the check", limit)

    def _next(self, deadline: float) -> dict[str, Any]:
        """Return the next message, {'late': True}, or {} if the process has ended."""
        try:
            return self._heard.get(timeout=max(0.0, deadline - time.monotonic())) or {}
        except queue.Empty:
            return {"late": True}

    def _broken(self, answer: dict[str, Any], where: str, limit: float) -> dict[str, Any]:
        if answer.get("late"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGUSR1)  # it writes its stacks
            time.sleep(0.5)
            found = {"status": "timeout", "error": f"not done after {limit:.1f} s {where}"}
        else:
            code = self._process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
            found = {"status": "error", "error": f"its process ended {where}: {how}"}
        return {**found, "traceback": self._tail(), "broken": True}

    def _tail(self) -> str:
        self._output.flush()
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - _TAIL))
        return self._output.read().decode(errors="replace")

    def _read(self, answers: int) -> None:
        with os.fdopen(answers) as lines:
            for line in lines:
                self._heard.put(json.loads(line))
        self._heard.put(None)

    def close(self) -> None:
        """Let it end; kill it if it does not."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._output.close()

    def kill(self) -> None:
        """End it and the processes that it started, each by its id."""
        for pid in [self._process.pid, *descendants(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def descendants(pid: int) -> list[int]:
    """Return the processes below this one, as Linux tells."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found, pending = [], [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found
