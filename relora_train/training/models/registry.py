"""Which code builds, trains and scores the model of each objective. Light: code is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from relora_train.settings.profile import Profile

if TYPE_CHECKING:
    from relora_train.training.models.base import Objective
    from relora_train.training.models.facts import ObjectiveFacts

_FACTS = {
    "causal_lm": "relora_train.training.models.causal_lm_facts:CausalLMFacts",
    "image_classification": "relora_train.training.models.image_facts:ImageFacts",
}
_CODE = {
    "causal_lm": "relora_train.training.models.causal_lm:CausalLM",
    "image_classification": "relora_train.training.models.image_classification:ImageClassification",
}


def facts_of(profile: Profile) -> ObjectiveFacts:
    """What is known of a profile's objective without torch."""
    return cast("ObjectiveFacts", _found(_FACTS[profile.objective])(profile))


def objective_of(profile: Profile) -> Objective:
    """The code that trains a profile. Imports torch."""
    return cast("Objective", _found(_CODE[profile.objective])(profile))


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
