"""The objectives: what is known of each without torch, and which code builds, trains and scores its models.

A sequence is one example: batch.sequence_length tokens, of which budgets are counted. An image is a sequence of
patches; the class token, which a vision transformer adds to it, is no token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from relora_train.errors import ModelNotFoundError, SequenceTooLongError, VocabularyMismatchError
from relora_train.settings.data import TokenizerConfig
from relora_train.settings.profile import Profile
from relora_train.training.models.kinds import (
    CAUSAL_LM,
    IMAGE_CLASSIFIER,
    MASKED_LM,
    SEQ2SEQ,
    SEQUENCE_CLASSIFIER,
    LoadedAs,
    check_place,
    read_config,
)
from relora_train.training.models.shape import ModelShape, ShapeUnknownError, read_json
from relora_train.training.models.shape_of_config import shape_of_config
from relora_train.training.models.shape_of_files import shape_of_files

if TYPE_CHECKING:
    from relora_train.data.tokenizer import DocumentTokenizer
    from relora_train.training.models.base import Objective


@dataclass(frozen=True)
class ObjectiveFacts(ABC):
    """An objective's view of one profile before anything starts."""

    profile: Profile
    code: ClassVar[str]
    """Module and class of its Objective; imported when it is asked for."""

    kind: ClassVar[LoadedAs]

    family: ClassVar[str]
    """The model_type of its new models."""

    @abstractmethod
    def rows_per_sequence(self) -> int:
        """Return the rows that one sequence makes in the input of a block's linear layers."""

    @abstractmethod
    def new_model_shape(self) -> ModelShape:
        """Return the shape of the model that a profile without model.pretrained trains; ShapeUnknownError."""

    def adapted(self, shape: ModelShape) -> ModelShape:
        """Return the shape of a model with the objective's head instead of its own."""
        return shape

    def tokenizer(self) -> TokenizerConfig:
        """Return the tokenizer that the profile means; it has a path if it is not to be trained."""
        return self.profile.tokenizer

    def check_tokenizer(self, loaded: DocumentTokenizer) -> None:  # noqa: B027 (most objectives take any)
        """Refuse a tokenizer that does not serve the objective. Raises TokenizerError."""

    @abstractmethod
    def check_pretrained(self, *, planned: bool = False) -> None:
        """Refuse a model.pretrained on this machine that cannot be trained so. Seconds, no network.

        planned: for a plan, which needs no tokenizer, and no weights beside config.json.
        """

    def local_pretrained(self) -> Path | None:
        """Return the directory of model.pretrained if it is on this machine. ModelNotFoundError for what is none."""
        named = self.profile.model.pretrained
        return check_place(named) if named is not None else None


class TextFacts(ObjectiveFacts):
    """The common part of objectives of text."""

    def rows_per_sequence(self) -> int:
        return self.profile.batch.sequence_length

    def config(self) -> dict[str, Any]:
        """Return the config.json of a new model, as far as its shape goes."""
        # The names of our [model] are those of a Llama's and of a BERT's.
        return {**self.profile.model.model_dump(), "vocab_size": _vocabulary(self.profile), "model_type": self.family}

    def new_model_shape(self) -> ModelShape:
        return shape_of_config(self.config(), "the profile's [model]")

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
        rows = read_config(directory, self.kind, key="vocab_size", planned=planned)
        with suppress(ModelNotFoundError):  # a model without positions of its own
            self.check_length(read_config(directory, self.kind, key="max_position_embeddings", planned=planned))
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


class CausalLMFacts(TextFacts):
    """Next-token prediction by a Llama."""

    code = "relora_train.training.models.causal_lm:CausalLM"
    kind = CAUSAL_LM
    family = "llama"


class MaskedLMFacts(TextFacts):
    """Prediction of hidden tokens by a BERT."""

    code = "relora_train.training.models.masked_lm:MaskedLM"
    kind = MASKED_LM
    family = "bert"

    def config(self) -> dict[str, Any]:
        return {**super().config(), "tie_word_embeddings": True, "type_vocab_size": 1}

    def tokenizer(self) -> TokenizerConfig:
        """Return the same, with a mask token if it is to be trained."""
        from relora_train.data.tokenizer import DEFAULT_MASK_TOKEN

        settings = super().tokenizer()
        named = settings.path is not None or settings.mask_token is not None
        return settings if named else settings.model_copy(update={"mask_token": DEFAULT_MASK_TOKEN})

    def check_tokenizer(self, loaded: DocumentTokenizer) -> None:
        from relora_train.data.tokenizer import mask_id_of

        name = self.tokenizer().path or "of this run"
        mask_id_of(loaded.json_text, loaded.config_text, self.profile.tokenizer.mask_token, name)


class SequenceClassificationFacts(TextFacts):
    """The class of a text, by an encoder or a decoder; a new model is a Llama."""

    code = "relora_train.training.models.sequence_classification:SequenceClassification"
    kind = SEQUENCE_CLASSIFIER
    family = "llama"

    def adapted(self, shape: ModelShape) -> ModelShape:
        """Return the shape with a head for two classes: how many there are is not known before the dataset is."""
        others = shape.other_matrices + shape.vocab_size * shape.hidden_size  # an embedding, and no head of its size
        return replace(shape, vocab_size=2, tied=True, classifies=True, rough=True, other_matrices=others)


class Seq2SeqFacts(TextFacts):
    """A text from a text, by a T5. Sequences are the encoder's; the decoder's are batch.target_length long."""

    code = "relora_train.training.models.seq2seq:Seq2Seq"
    kind = SEQ2SEQ
    family = "t5"

    def config(self) -> dict[str, Any]:
        model = self.profile.model
        names = {"d_model": "hidden_size", "d_ff": "intermediate_size", "d_kv": "head_size"}
        names |= {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
        own = {theirs: getattr(model, ours) for theirs, ours in names.items()}
        return {**super().config(), **own, "tie_word_embeddings": True}

    def check_length(self, positions: int) -> None:
        """Refuse sources and targets that are longer than the model's positions."""
        super().check_length(positions)
        if (length := self.profile.batch.target_length or 0) > positions:
            raise SequenceTooLongError(
                f"batch.target_length {length} is longer than the model's {positions} positions. "
                f"Set batch.target_length to {positions} or less."
            )


class ImageFacts(ObjectiveFacts):
    """Image classification by a vision transformer."""

    code = "relora_train.training.models.image_classification:ImageClassification"
    kind = IMAGE_CLASSIFIER
    family = "vit"

    def rows_per_sequence(self) -> int:
        return self.profile.batch.sequence_length + 1  # the class token

    def new_model_shape(self) -> ModelShape:
        images = self.profile.images
        config = {"model_type": self.family, **self.profile.model.model_dump(), "id2label": range(images.classes)}
        config |= {"image_size": images.size, "patch_size": images.patch_size, "num_channels": images.channels}
        return shape_of_config(config, "the profile's [model] and [images]")

    def check_pretrained(self, *, planned: bool = False) -> None:
        """Raise unless a local model has a configuration; the model's images are checked when it is loaded."""
        if directory := self.local_pretrained():
            read_config(directory, IMAGE_CLASSIFIER, key="image_size", planned=planned)


_FACTS: dict[str, type[ObjectiveFacts]] = {
    "causal_lm": CausalLMFacts,
    "masked_lm": MaskedLMFacts,
    "sequence_classification": SequenceClassificationFacts,
    "seq2seq": Seq2SeqFacts,
    "image_classification": ImageFacts,
}


def facts_of(profile: Profile) -> ObjectiveFacts:
    """Return what is known of a profile's objective without torch."""
    return _FACTS[profile.objective](profile)


def auto_class_of(objective: str) -> str:
    """Return the class of transformers that loads an objective's models."""
    return _FACTS[objective].kind.auto_class


def objective_of(profile: Profile) -> Objective:
    """Return the code that trains a profile. Imports torch."""
    module, _, name = _FACTS[profile.objective].code.partition(":")
    return cast("Objective", getattr(import_module(module), name)(profile))


def model_shape(profile: Profile) -> ModelShape:
    """Return the shape of the model a profile trains from local files; ShapeUnknownError if they do not suffice."""
    pretrained, facts = profile.model.pretrained, facts_of(profile)
    if pretrained is None:
        return facts.adapted(facts.new_model_shape())
    path = Path(pretrained).expanduser() / "config.json"
    return facts.adapted(shape_of_config(read_json(path, f"{pretrained!r} is downloaded"), path))


def counted_shape(profile: Profile) -> ModelShape:
    """Return the shape by which a plan counts: model_shape's, or that of any causal model whose files are here."""
    try:
        return model_shape(profile)
    except ShapeUnknownError:
        directory = Path(profile.model.pretrained or "").expanduser()
        if profile.model.pretrained is None or not any(directory.glob("*.safetensors")):
            raise
        config = read_json(directory / "config.json", f"{str(directory)!r} is downloaded")
        return facts_of(profile).adapted(shape_of_files(directory, config))


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
