"""Next-token prediction, as far as it is known without torch. Light."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from relora_train.errors import VocabularyMismatchError
from relora_train.settings.data import TokenizerConfig
from relora_train.settings.profile import Profile
from relora_train.training.models.pretrained_config import CAUSAL_LM, read_config
from relora_train.training.models.shape import ModelShape, llama_of_profile


@dataclass(frozen=True)
class CausalLMFacts:
    """As ObjectiveFacts."""

    profile: Profile

    def rows_per_sequence(self) -> int:
        return self.profile.batch.sequence_length

    def model_shape(self) -> ModelShape:
        return llama_of_profile(self.profile)

    def tokenizer(self) -> TokenizerConfig:
        """The model's own, unless the profile names one or wants one trained: embeddings belong to ids."""
        model, settings = self.profile.model, self.profile.tokenizer
        if model.pretrained is None or settings.path is not None or settings.train:
            return settings
        return settings.model_copy(update={"path": model.pretrained, "revision": model.revision})

    def check_pretrained(self) -> None:
        """A local model must have a configuration, and rows for every token of a local tokenizer."""
        profile = self.profile
        directory = Path(profile.model.pretrained).expanduser() if profile.model.pretrained else None
        if directory is None or not directory.exists():
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
            own = profile.tokenizer.path is None and not profile.tokenizer.train
            remedy = (
                "They do not belong together: give a model whose embedding has a row for each token."
                if own
                else "Use the model's own tokenizer: leave tokenizer.path and tokenizer.train out."
            )
            raise VocabularyMismatchError(
                f"The tokenizer has {entries} entries, the embedding of {directory} only {rows} rows. " + remedy
            )
