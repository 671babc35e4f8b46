"""What an objective knows of a profile before anything starts. Light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from relora_train.settings.data import TokenizerConfig
    from relora_train.training.models.shape import ModelShape


class ObjectiveFacts(Protocol):
    """Of one profile. A sequence is one example: batch.sequence_length tokens, of which budgets are counted."""

    def rows_per_sequence(self) -> int:
        """Rows that one sequence makes in the input of a block's linear layers."""

    def model_shape(self) -> ModelShape:
        """The shape of the model that a profile without model.pretrained trains; ShapeUnknownError."""

    def tokenizer(self) -> TokenizerConfig:
        """The tokenizer that the profile means; of a path when it is not to be trained."""

    def check_pretrained(self) -> None:
        """Refuse a model.pretrained on this machine that cannot be trained so. Seconds, no network."""
