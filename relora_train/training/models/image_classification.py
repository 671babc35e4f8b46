"""Image classification by transformers' ViT: pixels in, cross-entropy of the class, accuracy out.

Pixels are scaled to [0, 1] by the source's largest value. The channel's statistics over the training part, which the
dataset's manifest holds, then bring them to mean 0 and deviation 1. Images are not augmented.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.checkpoints.manifest import DatasetManifest, ImageFormat
from relora_train.data.dataset import ExampleDataset, ImageDataset
from relora_train.errors import DataError, ModelError
from relora_train.training.models.base import Evaluation, Objective


class ImageEvaluation(Evaluation):
    """Mean loss over val_images images, and the share of them whose class has the highest logit."""

    val_accuracy: float
    val_images: int


class ClassLoss:
    """The LossFunction of images. Examples are rows of an ImageDataset."""

    def __init__(self, model: nn.Module, images: ImageFormat) -> None:
        self._model, self._images = model, images
        self._mean = torch.tensor(images.mean).view(-1, 1, 1)
        self._deviation = torch.tensor(images.deviation).view(-1, 1, 1)

    def terms(self, examples: Tensor) -> Tensor:
        return torch.tensor(len(examples), device=examples.device)

    def loss(self, examples: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(examples).float(), _classes(examples), reduction="sum")

    def logits(self, examples: Tensor) -> Tensor:
        """Return logits (images, classes)."""
        return cast(Tensor, self._model(pixel_values=self.pixels(examples)).logits)

    def pixels(self, examples: Tensor) -> Tensor:
        """Return float32 (images, channels, size, size) with mean 0 and deviation 1 over the training part."""
        images = self._images
        values = examples[:, :-1].float().reshape(-1, images.channels, images.size, images.size)
        mean, deviation = self._mean.to(values.device), self._deviation.to(values.device)
        return (values / images.largest_value - mean) / deviation

    def sums(self, examples: Tensor) -> Tensor:
        """Return nats, images and right answers."""
        logits, classes = self.logits(examples).float(), _classes(examples)
        nats = F.cross_entropy(logits, classes, reduction="sum").double()
        right = (logits.argmax(dim=-1) == classes).sum().double()
        return torch.stack([nats, nats.new_tensor(len(examples)), right])


def _classes(examples: Tensor) -> Tensor:
    return examples[:, -1].long()


class ImageClassification(Objective):
    """The Objective of images."""

    adapter_task = None  # peft has no name for it and wraps any model without one
    evaluation = ImageEvaluation
    sums = 3

    def open_data(self, directory: Path, split: Literal["train", "val"]) -> ExampleDataset:
        data, wanted = ImageDataset(directory, split, seed=self.profile.seed), self.profile.images
        found = data.format
        if (found.size, found.channels, found.classes) != (wanted.size, wanted.channels, wanted.classes):
            raise DataError(
                f"Dataset {data.manifest.name!r} has images of {found.size} x {found.size} pixels, {found.channels} "
                f"channels and {found.classes} classes; the profile's [images] says {wanted.size} x {wanted.size}, "
                f"{wanted.channels} and {wanted.classes}. Set images.size, images.channels and images.classes to what "
                "the data has."
            )
        return data

    def new_model(self, manifest: DatasetManifest) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        model, images = self.profile.model, self.profile.images
        config = ViTConfig(
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            initializer_range=model.initializer_range,
            image_size=images.size,
            patch_size=images.patch_size,
            num_channels=images.channels,
            num_labels=images.classes,
            attn_implementation="sdpa",
        )
        return cast(nn.Module, ViTForImageClassification(config))

    def check_fits(self, model: nn.Module, manifest: DatasetManifest | None) -> None:
        config, images = cast(Any, model).config, self.profile.images
        ours = {
            "image_size": images.size,
            "patch_size": images.patch_size,
            "num_channels": images.channels,
            "num_labels": images.classes,
        }
        theirs = {name: getattr(config, name, None) for name in ours}
        if theirs != ours:
            raise ModelError(
                f"The model takes other images than the profile's [images] describes: {theirs}, not {ours}. Set "
                "[images] to what the model takes, and give it such images."
            )

    def stem(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, cast(Any, model).base_model.embeddings)

    def loss_function(self, model: nn.Module, manifest: DatasetManifest) -> ClassLoss:
        if manifest.images is None:
            raise DataError(f"Dataset {manifest.name!r} holds no images.")
        return ClassLoss(model, manifest.images)

    def guessing_loss(self, manifest: DatasetManifest) -> float:
        return math.log(self.profile.images.classes)

    def summarize(self, sums: Sequence[float], data: ExampleDataset) -> ImageEvaluation:
        nats, images, right = sums
        return ImageEvaluation(val_loss=nats / images, val_accuracy=right / images, val_images=int(images))
