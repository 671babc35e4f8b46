"""The objectives: what is known of each without torch, and which code builds, trains and scores its models.

A sequence is one example: batch.sequence_length tokens, of which budgets are counted. An image is a sequence of
patches; the class token, which a vision transformer adds to it, is no token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from relora_train.errors import VocabularyMismatchError
from relora_train.settings.data import TokenizerConfig
from relora_train.settings.profile import Profile
from relora_train.training.models.pretrained_config import CAUSAL_LM, IMAGE_CLASSIFIER, read_config
from relora_train.training.models.shape import ModelShape, ShapeUnknownError, read_json, shape_of_config

if TYPE_CHECKING:
    from relora_train.training.models.base import Objective


@dataclass(frozen=True)
class ObjectiveFacts(ABC):
    """An objective's view of one profile before anything starts."""

    profile: Profile
    code: ClassVar[str]
    """Module and class of its Objective; imported when it is asked for."""

    @abstractmethod
    def rows_per_sequence(self) -> int:
        """Return the rows that one sequence makes in the input of a block's linear layers."""

    @abstractmethod
    def new_model_shape(self) -> ModelShape:
        """Return the shape of the model that a profile without model.pretrained trains; ShapeUnknownError."""

    def tokenizer(self) -> TokenizerConfig:
        """Return the tokenizer that the profile means; it has a path if it is not to be trained."""
        return self.profile.tokenizer

    @abstractmethod
    def check_pretrained(self) -> None:
        """Refuse a model.pretrained on this machine that cannot be trained so. Seconds, no network."""

    def local_pretrained(self) -> Path | None:
        """Return the directory of model.pretrained if it is on this machine."""
        directory = Path(self.profile.model.pretrained).expanduser() if self.profile.model.pretrained else None
        return directory if directory is not None and directory.exists() else None


class CausalLMFacts(ObjectiveFacts):
    """Next-token prediction by a Llama."""

    code = "relora_train.training.models.causal_lm:CausalLM"

    def rows_per_sequence(self) -> int:
        return self.profile.batch.sequence_length

    def new_model_shape(self) -> ModelShape:
        # The names of our [model] are those of a Llama's config.json.
        config = {"model_type": "llama", **self.profile.model.model_dump(), "vocab_size": _vocabulary(self.profile)}
        return shape_of_config(config, "the profile's [model]")

    def tokenizer(self) -> TokenizerConfig:
        """Return the model's own, unless the profile names one or wants one trained: embeddings belong to ids."""
        model, settings = self.profile.model, self.profile.tokenizer
        if model.pretrained is None or settings.path is not None or settings.train:
            return settings
        return settings.model_copy(update={"path": model.pretrained, "revision": model.revision})

    def check_pretrained(self) -> None:
        """Raise unless a local model has a configuration, and rows for every token of a local tokenizer."""
        directory = self.local_pretrained()
        if directory is None:
            return
        rows = read_config(directory, CAUSAL_LM, key="vocab_size")
        tokenizer = self.tokenizer()
        entries = tokenizer.vocab_size
        if tokenizer.path is not None:
            if not Path(tokenizer.path).expanduser().exists():
                return
            from relora_train.data.tokenizer import load_tokenizer

            entries = load_tokenizer(tokenizer.path, eos_token=tokenizer.eos_token).vocab_size
        if entries > rows:
            own = self.profile.tokenizer.path is None and not self.profile.tokenizer.train
            remedy = (
                "They do not belong together: give a model whose embedding has a row for each token."
                if own
                else "Use the model's own tokenizer: leave tokenizer.path and tokenizer.train out."
            )
            raise VocabularyMismatchError(
                f"The tokenizer has {entries} entries, the embedding of {directory} only {rows} rows. " + remedy
            )


class ImageFacts(ObjectiveFacts):
    """Image classification by a vision transformer."""

    code = "relora_train.training.models.image_classification:ImageClassification"

    def rows_per_sequence(self) -> int:
        return self.profile.batch.sequence_length + 1  # the class token

    def new_model_shape(self) -> ModelShape:
        images = self.profile.images
        config = {"model_type": "vit", **self.profile.model.model_dump(), "id2label": range(images.classes)}
        config |= {"image_size": images.size, "patch_size": images.patch_size, "num_channels": images.channels}
        return shape_of_config(config, "the profile's [model] and [images]")

    def check_pretrained(self) -> None:
        """Raise unless a local model has a configuration; the model's images are checked when it is loaded."""
        if directory := self.local_pretrained():
            read_config(directory, IMAGE_CLASSIFIER, key="image_size")


_FACTS: dict[str, type[ObjectiveFacts]] = {"causal_lm": CausalLMFacts, "image_classification": ImageFacts}


def facts_of(profile: Profile) -> ObjectiveFacts:
    """Return what is known of a profile's objective without torch."""
    return _FACTS[profile.objective](profile)


def objective_of(profile: Profile) -> Objective:
    """Return the code that trains a profile. Imports torch."""
    module, _, name = _FACTS[profile.objective].code.partition(":")
    return cast("Objective", getattr(import_module(module), name)(profile))


def model_shape(profile: Profile) -> ModelShape:
    """Return the shape of the model a profile trains from local files; ShapeUnknownError if they do not suffice."""
    pretrained = profile.model.pretrained
    if pretrained is None:
        return facts_of(profile).new_model_shape()
    path = Path(pretrained).expanduser() / "config.json"
    return shape_of_config(read_json(path, f"{pretrained!r} is downloaded"), path)


def _vocabulary(profile: Profile) -> int:
    """Return the rows of the embedding: as set, or the entries of the tokenizer."""
    if profile.model.vocab_size is not None:
        return profile.model.vocab_size
    if profile.tokenizer.path is None:
        return profile.tokenizer.vocab_size
    path = Path(profile.tokenizer.path)
    content: dict[str, Any] = read_json(
        path / "tokenizer.json" if path.is_dir() else path,
        f"the tokenizer {profile.tokenizer.path!r} is loaded; set model.vocab_size to know them now",
    )
    try:
        vocabulary = content["model"]["vocab"]
        entries = {entry if isinstance(entry, str) else entry[0] for entry in vocabulary}
        return len(entries | {added["content"] for added in content.get("added_tokens") or ()})
    except (KeyError, TypeError, IndexError):
        raise ShapeUnknownError(f"{path} is not a tokenizer.json with a vocabulary; set model.vocab_size") from None
