"""Settings of images, of objective 'image_classification'."""

from typing import Self

from pydantic import Field, model_validator

from relora_train.settings.base import FrozenConfig


class ImagesConfig(FrozenConfig):
    """Objective 'image_classification': what the images are, and how a vision transformer cuts them."""

    size: int = Field(8, ge=1)
    """Pixels of a side; images are square."""

    channels: int = Field(1, ge=1)
    """Values of a pixel."""

    classes: int = Field(10, ge=2, le=256)
    """Classes that an image can have."""

    patch_size: int = Field(2, ge=1)
    """Pixels of a side of a patch. A patch is a token: batch.sequence_length is how many an image has."""

    @model_validator(mode="after")
    def patches_fill_the_image(self) -> Self:
        if self.size % self.patch_size:
            raise ValueError(f"size {self.size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch_size**2
