"""The record of a check while it runs: numbers, and whether they are as they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class SkippedError(Exception):
    """Raised by a check that cannot run here; the text says why."""


class Run:
    """One run of one check.

    device_only marks what nothing but a GPU can show: in a dry run it is measured, noted as not judged, and not judged.
    """

    def __init__(
        self, *, tell: Callable[[dict[str, Any]], None], device_type: str, scratch: Path, shared: Path
    ) -> None:
        self._tell = tell
        self.device_type = device_type
        self.scratch, self.shared = scratch, shared
        """This run's own directory, and that of all checks together."""

        self._passed = 0
        self._failed: list[str] = []
        self._findings: list[str] = []
        self._not_judged: list[str] = []

    @property
    def dry(self) -> bool:
        return self.device_type == "cpu"

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.device_type, 0) if self.device_type == "cuda" else torch.device("cpu")

    def record(self, **measured: Any) -> None:
        """Write numbers down; they stay known whatever becomes of the check."""
        self._tell({name: plain(value) for name, value in measured.items()})

    def require(self, what: str, holds: bool, *, device_only: bool = False) -> None:
        """Fail the check if this does not hold."""
        if device_only and self.dry:
            self._not_judged.append(what)
        elif holds:
            self._passed += 1
        else:
            self._failed.append(what)

    def below(self, what: str, value: float, limit: float, *, device_only: bool = False) -> None:
        """Write the value down, and fail the check if it is not below the limit (nan never is)."""
        self.record(**{what: {"value": value, "limit": limit}})
        self.require(f"{what}: {value:.4g} is not below {limit:g}", bool(value < limit), device_only=device_only)

    def expect(self, what: str, holds: bool) -> None:
        """Note a finding if this does not hold; only a GPU can show it."""
        if self.dry:
            self._not_judged.append(what)
        elif holds:
            self._passed += 1
        else:
            self._findings.append(what)

    def need_gpu_memory(self, size: float) -> None:
        """Skip the check on a smaller card."""
        import torch

        if not self.dry and torch.cuda.get_device_properties(0).total_memory < size:
            raise SkippedError(f"it takes a GPU of {size / 1e9:.0f} GB")

    def result(self) -> dict[str, Any]:
        """Return the fields of the result so far."""
        nothing_judged = self.dry and not self._passed and not self._failed
        return {
            "status": "fail" if self._failed else "skipped" if nothing_judged else "pass",
            "error": "its code ran on a CPU, which shows nothing of a GPU" if nothing_judged else None,
            "passed": self._passed,
            "failed": self._failed,
            "findings": self._findings,
            "not_judged": self._not_judged,
        }


def plain(value: Any) -> Any:
    """Return the value in JSON's types; a number that JSON lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return round(value, 6 - math.ceil(math.log10(abs(value)))) if math.isfinite(value) and value else str(value)
    if hasattr(value, "item") and getattr(value, "numel", lambda: 1)() == 1:
        return plain(value.item())
    return str(value)
