"""The objectives there are, in one table: which data each takes, what it is scored by, which code knows the rest.

Nothing else asks which objective a profile has. To add one: an entry here, its facts and its code in training/models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from relora_train.settings.data import Holds
from relora_train.text import MISSING

if TYPE_CHECKING:
    from relora_train.settings.profile import Profile

ObjectiveName = Literal["causal_lm", "masked_lm", "sequence_classification", "seq2seq", "image_classification"]

TEXT_SOURCES = ("python-stdlib", "packages", "text", "jsonl", "csv", "parquet", "hub")

DEFAULT_OBJECTIVE: ObjectiveName = "causal_lm"
"""The objective of profiles that name none, and of all that was made before there was another."""


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
MASKED_PERPLEXITY = Measure("val_masked_perplexity", "masked perplexity", "perplexity", digits=2, short_digits=2)
BITS_PER_BYTE = Measure("bits_per_byte", "bits per byte", "bits/byte", digits=3, short_digits=2)
F1 = Measure("val_f1", "F1", "F1", digits=4, short_digits=4, higher_is_better=True)
EXACT_MATCH = Measure("val_exact_match", "exact match", "exact", digits=4, short_digits=4, higher_is_better=True)
ACCURACY = Measure("val_accuracy", "accuracy", "accuracy", digits=4, short_digits=4, higher_is_better=True)


@dataclass(frozen=True)
class Objective:
    """One objective, and its scores: one number before all others, and one beside it."""

    sources: tuple[str, ...]
    """Values of data.source that it can train on."""

    learns_from: tuple[Holds, ...]
    """The values of SourceConfig.holds that such a source may have."""

    own_keys: tuple[str, ...]
    """Keys of a profile that mean something to it alone: part of its fingerprints, and of no other objective's."""

    in_series: bool
    """True if its sources can grow and be retrained on."""

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

    has_tasks: bool
    """True if lm-evaluation-harness can score its models."""

    pipeline_tag: str
    """Its models' task on the hub."""

    budget: str = "tokens"
    """The parts of an example that a budget is counted in."""


OBJECTIVES: Mapping[str, Objective] = {
    "causal_lm": Objective(
        sources=TEXT_SOURCES,
        learns_from=("texts", "messages", "prompts"),
        own_keys=(),
        in_series=True,
        headline=PERPLEXITY,
        second=BITS_PER_BYTE,
        judged=LOSS,
        unit="token",
        scored="val_tokens",
        held_out="text",
        has_tasks=True,
        pipeline_tag="text-generation",
    ),
    "masked_lm": Objective(
        sources=TEXT_SOURCES,
        learns_from=("texts",),
        own_keys=(),
        in_series=False,
        headline=MASKED_PERPLEXITY,
        second=LOSS,
        judged=LOSS,
        unit="token",
        scored="val_masked_tokens",
        held_out="text",
        has_tasks=False,
        pipeline_tag="fill-mask",
    ),
    "sequence_classification": Objective(
        sources=TEXT_SOURCES,
        learns_from=("labels",),
        own_keys=(),
        in_series=False,
        headline=ACCURACY,
        second=F1,
        judged=ACCURACY,
        unit="example",
        scored="val_examples",
        held_out="examples",
        has_tasks=False,
        pipeline_tag="text-classification",
    ),
    "seq2seq": Objective(
        sources=TEXT_SOURCES,
        learns_from=("prompts",),
        own_keys=(),
        in_series=False,
        headline=EXACT_MATCH,
        second=LOSS,
        judged=LOSS,
        unit="token",
        scored="val_target_tokens",
        held_out="text",
        has_tasks=False,
        pipeline_tag="text2text-generation",
    ),
    "image_classification": Objective(
        sources=("digits", "idx"),
        learns_from=("texts",),
        own_keys=("images",),
        in_series=False,
        headline=ACCURACY,
        second=LOSS,
        judged=ACCURACY,
        unit="image",
        scored="val_images",
        held_out="images",
        has_tasks=False,
        pipeline_tag="image-classification",
        budget="patches",
    ),
}


def measures_in(scores: Mapping[str, Any]) -> Objective:
    """Return the objective of recorded scores, by its first measure and what stands beside it, or the default.

    Two objectives have accuracy first. A class of texts has F1 beside it, and is asked before images.
    """
    found = [entry for entry in OBJECTIVES.values() if entry.headline.key in scores]
    return max(found, key=lambda e: (e.scored in scores, e.second.key in scores), default=OBJECTIVES[DEFAULT_OBJECTIVE])


SCORES = tuple(dict.fromkeys(["val_loss", *(m.key for e in OBJECTIVES.values() for m in (e.headline, e.second))]))
"""Names of all measures, in records and manifests."""


def own_settings(profile: "Profile") -> dict[str, Any]:
    """Return the settings that the objective adds to a fingerprint, as JSON values."""
    keys = _keys_of(profile.objective)
    return profile.model_dump(mode="json", include=keys) if keys else {}


def foreign_keys(objective: ObjectiveName) -> set[str]:
    """Keys of a profile that are not told apart for an objective: no part of its runs' names."""
    return {"objective"}.union(*map(_keys_of, OBJECTIVES)) - _keys_of(objective)


def _keys_of(objective: str) -> set[str]:
    """Return them with the objective's name, except for the default: older runs keep their fingerprints."""
    return {*OBJECTIVES[objective].own_keys} | ({"objective"} if objective != DEFAULT_OBJECTIVE else set())
