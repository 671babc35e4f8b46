"""The most memory a process held on its device since the last reset: allocated on a GPU, resident on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Count anew from what is held now. If the system cannot do that for a CPU, the peak stays the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """Return the bytes; None if the system does not tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_bytes("VmHWM")


def process_bytes(field: str) -> int | None:
    """Return a size in bytes that Linux tells of this process, such as VmRSS, the memory that is resident now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
