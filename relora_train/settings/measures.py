"""The scores of held-out examples, and their wording for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MISSING = "–"


@dataclass(frozen=True)
class Measure:
    """A number of an evaluation."""

    key: str
    """Its name in records and manifests."""

    name: str
    """In a sentence: 'perplexity'."""

    short: str
    """In a narrow column: 'bits/byte'."""

    digits: int
    """After the point."""

    short_digits: int
    """In a narrow column."""

    higher_is_better: bool = False

    def text(self, value: float | None, *, digits: int | None = None) -> str:
        """'98.33', '1,235': no digits after the point from 1,000 on."""
        if value is None:
            return MISSING
        shown = 0 if value >= 1000 else self.digits if digits is None else digits
        return "∞" if math.isinf(value) else f"{value:,.{shown}f}"

    def arrow(self, before: float | None, after: float | None, *, digits: int | None = None) -> str:
        """'120.41 → 98.33'; only the latter where the former is missing."""
        now = self.text(after, digits=digits)
        return now if before is None else f"{self.text(before, digits=digits)} → {now}"

    def change(self, scores: Mapping[str, Any], *, digits: int | None = None) -> str:
        """Return the arrow of a manifest's scores, which hold the stage's start under names that end in '_before'."""
        return self.arrow(scores.get(f"{self.key}_before"), scores.get(self.key), digits=digits)


LOSS = Measure("val_loss", "loss", "loss", digits=4, short_digits=4)
PERPLEXITY = Measure("val_perplexity", "perplexity", "perplexity", digits=2, short_digits=2)
BITS_PER_BYTE = Measure("bits_per_byte", "bits per byte", "bits/byte", digits=3, short_digits=2)
ACCURACY = Measure("val_accuracy", "accuracy", "accuracy", digits=4, short_digits=4, higher_is_better=True)


@dataclass(frozen=True)
class Measures:
    """The scores of an objective: one number before all others, and one beside it."""

    headline: Measure
    second: Measure
    judged: Measure
    """The score by which arms of an experiment are compared, seed by seed."""

    unit: str
    """The unit that a loss is a mean over: 'token', 'image'."""

    scored: str
    """Key of how many of them were scored."""

    held_out: str
    """The held-out data: 'text', 'images'."""
