"""The common part of the objectives of text: rows of token ids in, an embedding that has a row for each id."""

import math
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import ExampleDataset
from relora_train.data.mixed_dataset import open_tokens
from relora_train.errors import VocabularyMismatchError
from relora_train.settings.profile import Profile
from relora_train.training.models.base import Objective
from relora_train.training.models.model import embedding
from relora_train.training.models.pretrained import NewHead
from relora_train.training.models.registry import TextFacts, facts_of


class TextObjective(Objective):
    """An Objective whose examples are token ids."""

    def open_data(self, directory: Path, split: Literal["train", "val"]) -> ExampleDataset:
        length, seed = self.profile.batch.sequence_length, self.profile.seed
        return open_tokens(directory, split, sequence_length=length, seed=seed, too_long=self.profile.batch.too_long)

    def check_fits(self, model: nn.Module, manifest: DatasetManifest | None) -> None:
        """Refuse a tokenizer with ids the embedding lacks, and sequences longer than the model's positions."""
        rows = embedding(model).num_embeddings
        if manifest is not None and manifest.vocab_size > rows:
            raise VocabularyMismatchError(
                f"The tokenizer has {manifest.vocab_size} entries, the model's embedding only {rows} rows. "
                "Continue a model with its own tokenizer: leave tokenizer.path and tokenizer.train out. For a new "
                "model, set model.vocab_size to at least that many."
            )
        longest = getattr(cast(Any, model).config, "max_position_embeddings", None)
        if longest is not None:
            # RoBERTa numbers positions from one beyond the padding's.
            offsets = (m.padding_idx for name, m in model.named_modules() if name.endswith(".position_embeddings"))
            first = next((cast(int, index) + 1 for index in offsets if index is not None), 0)
            cast(TextFacts, facts_of(self.profile)).check_length(longest - first)

    def stem(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, getattr(cast(Any, model).base_model, "embeddings", None) or embedding(model))

    def guessing_loss(self, manifest: DatasetManifest) -> float:
        return math.log(manifest.vocab_size)


def new_llama(profile: Profile, made: type, manifest: DatasetManifest, head: NewHead | None = None) -> nn.Module:
    """Return a Llama of the profile's shape, as the class `made` of transformers, with random weights."""
    from transformers import LlamaConfig

    model = profile.model
    config = LlamaConfig(
        **model.model_dump(exclude={"pretrained", "revision", "vocab_size", "rope_theta"}),
        vocab_size=model.vocab_size or manifest.vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        bos_token_id=manifest.eos_id,
        eos_token_id=manifest.eos_id,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    if head is not None:
        head.describe(config)
    return cast(nn.Module, made(config))


def new_bert(profile: Profile, made: type, manifest: DatasetManifest, **settings: Any) -> nn.Module:
    """Return a BERT of the profile's shape, as the class `made` of transformers, with random weights."""
    from transformers import BertConfig

    model = profile.model
    config = BertConfig(
        vocab_size=model.vocab_size or manifest.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=model.max_position_embeddings,
        initializer_range=model.initializer_range,
        hidden_dropout_prob=0.0,  # as our other new models; a pretrained one keeps its own
        attention_probs_dropout_prob=0.0,
        type_vocab_size=1,
        pad_token_id=None,
        attn_implementation="sdpa",
        **settings,
    )
    return cast(nn.Module, made(config))


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf  # it overflows from 710
