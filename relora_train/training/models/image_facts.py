"""Image classification by a vision transformer, as far as it is known without torch. Light.

A token is a patch: an image is a sequence of batch.sequence_length of them, so budgets, tokens per second and FLOPs a
token mean for images what they mean for text. The class token, which the model adds to every image, is no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from relora_train.settings.data import TokenizerConfig
from relora_train.settings.profile import Profile
from relora_train.training.models.pretrained_config import IMAGE_CLASSIFIER, read_config
from relora_train.training.models.shape import ModelShape, vit

CLASS_TOKENS = 1


@dataclass(frozen=True)
class ImageFacts:
    """As ObjectiveFacts."""

    profile: Profile

    def rows_per_sequence(self) -> int:
        return self.profile.batch.sequence_length + CLASS_TOKENS

    def model_shape(self) -> ModelShape:
        model, images = self.profile.model, self.profile.images
        return vit(
            classes=images.classes,
            hidden=model.hidden_size,
            intermediate=model.intermediate_size,
            layers=model.num_hidden_layers,
            patch_values=images.patch_values,
            patches=images.patches,
        )

    def tokenizer(self) -> TokenizerConfig:
        return self.profile.tokenizer

    def check_pretrained(self) -> None:
        """A local model must have a configuration; whether it takes the images is seen when it is loaded."""
        directory = Path(self.profile.model.pretrained).expanduser() if self.profile.model.pretrained else None
        if directory is None or not directory.exists():
            return
        read_config(directory, IMAGE_CLASSIFIER, key="image_size")
