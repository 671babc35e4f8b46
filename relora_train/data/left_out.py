"""Faults that `data.unreadable = "skip"` leaves out of a source, null texts, their counts, and the line that tells."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from relora_train.errors import SourceUnreadableError

Unit = Literal["records", "files"]


class Fault(Exception):  # noqa: N818  # as often a value as raised
    """A record without text, or a file that is no text. The settings say if it ends the reading or is left out."""

    def __init__(self, message: str, reason: str, unit: Unit = "records") -> None:
        super().__init__(message)
        self.kind = unit, reason

    def as_error(self) -> SourceUnreadableError:
        """Return the error of a run that does not leave it out."""
        remedy = f'With data.unreadable = "skip" such {self.kind[0]} are left out and counted.'
        return SourceUnreadableError(f"{self} {remedy}")


NULL = Fault("The record's text is null.", "text is null")
"""Stands for a null text: counted and left out, and never an error."""


def text_or_fault(value: Any, text_field: str, where: str, setting: str = "data.text_field") -> str | Fault:
    """Return a record's text, which UTF-8 can encode; NULL for null."""
    if value is None:
        return NULL
    if not isinstance(value, str):
        what = f"{where}: the field {text_field!r} holds a {type(value).__name__}, not text."
        return Fault(f"{what} Name another field in {setting}.", f"no text in {text_field!r}")
    try:
        _ = value.isascii() or value.encode()  # the first needs no copy of a long text
    except UnicodeEncodeError as error:
        half = f"character {error.start} is half of a surrogate pair ({error.object[error.start]!r})"
        what = f"{where}: {half}, which no encoding can hold. Repair or remove that document."
        return Fault(what, "half of a surrogate pair")
    return value


@dataclass
class FileTally:
    """The records read of one file, and the faults in it."""

    records: int = 0
    faults: Counter[tuple[Unit, str]] = field(default_factory=Counter)
    first: dict[tuple[Unit, str], str] = field(default_factory=dict)
    """The place of the first fault of each kind."""

    def add(self, fault: Fault, where: str) -> None:
        self.records += fault.kind[0] == "records"
        self.faults[fault.kind] += 1
        self.first.setdefault(fault.kind, where)


class LeftOut:
    """Tallies by file. A file that is read again begins a new one, so that nothing is counted twice."""

    def __init__(self) -> None:
        self._files: dict[str, FileTally] = {}

    def begin(self, name: str) -> FileTally:
        self._files[name] = FileTally()
        return self._files[name]

    def facts(self) -> list[dict[str, Any]]:
        """Return what a manifest keeps of each kind of fault."""
        tallies = self._files.values()
        of = {"records": sum(tally.records for tally in tallies), "files": len(tallies)}
        first = {kind: where for tally in reversed(tallies) for kind, where in tally.first.items()}
        faults = sum((tally.faults for tally in tallies), Counter[tuple[Unit, str]]())
        return [
            {"unit": unit, "reason": reason, "count": count, "of": of[unit], "first": first[unit, reason]}
            for (unit, reason), count in sorted(faults.items(), reverse=True)
        ]


def too_long_note(left_out: Mapping[str, int]) -> str:
    """Say how many examples are longer than a row, and what became of them; '' if none is."""
    done = {"cut": "cut to its length", "dropped": "left out"}
    said = " and ".join(f"{left_out[key]:,} {what}" for key, what in done.items() if left_out.get(key))
    return said and f"training examples longer than a sequence: {said}"


def left_out_note(facts: Iterable[Mapping[str, Any]]) -> str:
    """Say what was left out; '' if nothing was."""
    said = " and ".join("{count:,} of {of:,} {unit} ({reason}; first: {first})".format(**fact) for fact in facts)
    return said and f"left out {said}"
