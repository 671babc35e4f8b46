"""The process that holds a lease, and evidence of its death that can be seen from here."""

import os
import secrets
import socket
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

_held_here: set[str] = set()
"""Nonces of the leases that this process holds or has asked for."""


class Holder(BaseModel):
    """A process, told apart from every other one that had or will have its PID."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    boot: str | None = None
    """Machine's boot, PID namespace and the process's start: None where the system does not tell."""
    process_started: str | None = None
    nonce: str

    @classmethod
    def this_process(cls) -> Self:
        """Return this process as the holder of one lease, until `let_go` is called."""
        nonce = secrets.token_hex(8)
        _held_here.add(nonce)
        return cls(
            host=socket.gethostname(), pid=os.getpid(), boot=_boot(), process_started=_process_started(os.getpid()),
            nonce=nonce,
        )  # fmt: skip

    def let_go(self) -> None:
        """Note that this process did not get the lease, or has released it."""
        _held_here.discard(self.nonce)

    def is_alive(self) -> bool | None:
        """Return True if the process lives and, if it is this one, still wants the lease; None if it cannot be told."""
        if self.boot is None or self.process_started is None or self.boot != _boot():
            return None
        if self.host != socket.gethostname():
            return None
        if self.pid == os.getpid() and self.nonce not in _held_here:
            return False  # such as one that was granted by an answer that never came
        return _process_started(self.pid) == self.process_started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _process_started(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks since boot; None if it is gone, waited for or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
