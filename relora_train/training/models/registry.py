"""The objectives: what is known of each without torch, and which code builds, trains and scores its models.

A sequence is one example: batch.sequence_length tokens, of which budgets are counted. An image is a sequence of
patches; the class token, which a vision transformer adds to it, is no token.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from relora_train.errors import (
    ModelNotFoundError,
    ModelUnsuitableError,
    SequenceTooLongError,
    VocabularyMismatchError,
)
from relora_train.settings.data import TokenizerConfig
from relora_train.settings.profile import Profile
from relora_train.training.models.shape import ModelShape, ShapeUnknownError, read_json, shape_of_config
from relora_train.training.models.shape_of_files import shape_of_files

if TYPE_CHECKING:
    from relora_train.training.models.base import Objective


@dataclass(frozen=True)
class LoadedAs:
    """The kind of model that an objective trains, in the words of transformers."""

    auto_class: str

    architectures: tuple[str, ...]
    """Part of the names of its classes. A class without a task, such as LlamaModel, has none."""


CAUSAL_LM = LoadedAs("AutoModelForCausalLM", ("ForCausalLM", "LMHead"))
IMAGE_CLASSIFIER = LoadedAs("AutoModelForImageClassification", ("ForImageClassification",))


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
    def check_pretrained(self, *, planned: bool = False) -> None:
        """Refuse a model.pretrained on this machine that cannot be trained so. Seconds, no network.

        planned: for a plan, which needs no tokenizer, and no weights beside config.json.
        """

    def local_pretrained(self) -> Path | None:
        """Return the directory of model.pretrained if it is on this machine. ModelNotFoundError for what is none."""
        named = self.profile.model.pretrained
        return check_place(named) if named is not None else None


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

    def check_length(self, positions: int) -> None:
        """Refuse sequences that are longer than the model's positions."""
        if (length := self.profile.batch.sequence_length) > positions:
            raise SequenceTooLongError(
                f"batch.sequence_length {length} is longer than the model's {positions} positions. "
                f"Set batch.sequence_length to {positions} or less."
            )

    def check_pretrained(self, *, planned: bool = False) -> None:
        """Raise unless a local model has a configuration, positions for a sequence, and rows for a local tokenizer."""
        directory = self.local_pretrained()
        if directory is None:
            return
        rows = read_config(directory, CAUSAL_LM, key="vocab_size", planned=planned)
        with suppress(ModelNotFoundError):  # a model without positions of its own
            self.check_length(read_config(directory, CAUSAL_LM, key="max_position_embeddings", planned=planned))
        if planned:
            return
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

    def check_pretrained(self, *, planned: bool = False) -> None:
        """Raise unless a local model has a configuration; the model's images are checked when it is loaded."""
        if directory := self.local_pretrained():
            read_config(directory, IMAGE_CLASSIFIER, key="image_size", planned=planned)


def check_place(model: str | Path) -> Path | None:
    """Return what lies at the path; None for what may be a hub id. Raises ModelNotFoundError for a path to nothing."""
    directory = Path(model).expanduser()
    if directory.exists():
        return directory
    if str(model).startswith((".", "/", "~")):
        raise ModelNotFoundError(
            f"model.pretrained {str(model)!r} is no directory. Correct the path, or give a hub id."
        )
    return None


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


def counted_shape(profile: Profile) -> ModelShape:
    """Return the shape by which a plan counts: model_shape's, or that of any causal model whose files are here."""
    try:
        return model_shape(profile)
    except ShapeUnknownError:
        directory = Path(profile.model.pretrained or "").expanduser()
        if profile.model.pretrained is None or not any(directory.glob("*.safetensors")):
            raise
        return shape_of_files(directory, read_json(directory / "config.json", f"{str(directory)!r} is downloaded"))


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


def read_config(directory: Path, kind: LoadedAs, *, key: str, planned: bool = False) -> int:
    """Return the number that the config.json of a local model has under `key`.

    Raises ModelNotFoundError for a directory without such a file or without safetensors, and as check_config. A plan
    may be made of a config.json alone.
    """
    place = f"model.pretrained {str(directory)!r}"
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except OSError:
        raise ModelNotFoundError(
            f"{place} has no config.json, so it is no model of transformers. Give a directory that save_pretrained "
            "wrote; GGUF and other formats are not read."
        ) from None
    except ValueError as error:
        raise ModelNotFoundError(f"{directory / 'config.json'} is not JSON: {error}. Copy the model again.") from None
    try:
        check_config(config, directory, kind)
        number = int({**config, **(config.get("text_config") or {})}[key])  # a part for text, beside others
    except (KeyError, TypeError, ValueError):
        raise ModelNotFoundError(
            f"{place} has a config.json without {key}, so it is no model that transformers loads for this objective. "
            "Correct the path."
        ) from None
    if not any(directory.glob("*.safetensors")) and not (planned and not any(directory.glob("*.bin"))):
        raise ModelNotFoundError(
            f"{place} holds no weights in safetensors, and others are never loaded: pickles can run code. Load the "
            "model with transformers where you trust it, and give what save_pretrained writes."
        )
    return number


def check_config(config: Mapping[str, Any], where: str | Path, kind: LoadedAs, *, made_as: str | None = None) -> None:
    """Raise ModelUnsuitableError for quantised weights, and for an architecture made for another task.

    made_as: the class that transformers makes of it. While that is unknown, a model of text and something else passes.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"{where} is no JSON object")
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for quantised in (part.get(key) for part in parts for key in ("quantization_config", "compression_config")):
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            raise ModelUnsuitableError(
                f"The weights of {str(where)!r} are quantised (quantization_config in its config.json, method "
                f"{method!r}). A merge into them would lose the update, or write damaged weights. Give the model's "
                "unquantised weights."
            )
    if made_as is None and "text_config" in config:
        return
    for name in config.get("architectures") or ():
        bare = name.endswith("Model") and "Head" not in name
        if not bare and name != made_as and not any(part in name for part in kind.architectures):
            raise ModelUnsuitableError(
                f"{str(where)!r} is a {name} (architectures in its config.json) and would be loaded as "
                f"{made_as or kind.auto_class}: a part of it would be lost, and what it lacks made up. Give a model "
                "that was made for this objective, or set `objective` to what this one was made for."
            )
