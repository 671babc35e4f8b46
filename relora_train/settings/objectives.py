"""The objectives there are, in one table: which data each takes, what it is scored by, which code knows the rest.

Nothing else asks which objective a profile has. To add one: an entry here, its facts and its code in training/models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from relora_train.settings.measures import ACCURACY, BITS_PER_BYTE, LOSS, PERPLEXITY, Measures

if TYPE_CHECKING:
    from relora_train.settings.profile import Profile

ObjectiveName = Literal["causal_lm", "image_classification"]

DEFAULT_OBJECTIVE: ObjectiveName = "causal_lm"
"""The objective of profiles that name none, and of all that was made before there was another."""


@dataclass(frozen=True)
class ObjectiveEntry:
    """One objective."""

    sources: tuple[str, ...]
    """Values of data.source that it can train on."""

    own_keys: tuple[str, ...]
    """Keys of a profile that mean something to it alone: part of its fingerprints, and of no other objective's."""

    in_series: bool
    """True if its sources can grow and be retrained on."""

    measures: Measures


OBJECTIVES: Mapping[str, ObjectiveEntry] = {
    "causal_lm": ObjectiveEntry(
        sources=("python-stdlib", "text", "jsonl", "parquet", "hub"),
        own_keys=(),
        in_series=True,
        measures=Measures(PERPLEXITY, BITS_PER_BYTE, judged=LOSS, unit="token", scored="val_tokens", held_out="text"),
    ),
    "image_classification": ObjectiveEntry(
        sources=("digits", "idx"),
        own_keys=("images",),
        in_series=False,
        measures=Measures(ACCURACY, LOSS, judged=ACCURACY, unit="image", scored="val_images", held_out="images"),
    ),
}


def measures_of(profile: Profile) -> Measures:
    """Return the scores of a profile's runs."""
    return OBJECTIVES[profile.objective].measures


def measures_in(scores: Mapping[str, Any]) -> Measures:
    """Return the measures of recorded scores: the objective whose first measure is among them, or the default."""
    found = (entry.measures for entry in OBJECTIVES.values() if entry.measures.headline.key in scores)
    return next(found, OBJECTIVES[DEFAULT_OBJECTIVE].measures)


SCORES = tuple(
    dict.fromkeys(["val_loss", *(m.key for e in OBJECTIVES.values() for m in (e.measures.headline, e.measures.second))])
)
"""Names of all measures, in records and manifests."""


def headline_score(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the one number before all others, under its name: for an event."""
    key = measures_in(scores).headline.key
    return {key: scores.get(key)}


def own_settings(profile: Profile) -> dict[str, Any]:
    """Return the settings that the objective adds to a fingerprint, as JSON values."""
    keys = _keys_of(profile.objective)
    return profile.model_dump(mode="json", include=keys) if keys else {}


def foreign_keys(objective: ObjectiveName) -> set[str]:
    """Keys of a profile that are not told apart for an objective: no part of its runs' names."""
    return {"objective"}.union(*map(_keys_of, OBJECTIVES)) - _keys_of(objective)


def _keys_of(objective: str) -> set[str]:
    """Return them with the objective's name, except for the default: older runs keep their fingerprints."""
    return {*OBJECTIVES[objective].own_keys} | ({"objective"} if objective != DEFAULT_OBJECTIVE else set())
