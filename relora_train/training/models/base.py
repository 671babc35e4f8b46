"""The work of an objective for the trainer: make the model, read examples, compute the loss, score, sample.

An example is one row of integers, a batch (examples, row length) of them: text is token ids, an image its pixels and
its class. So data order, shares of ranks, micro-batches and resuming are the same for all (dataset.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import ExampleDataset


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on held-out examples; an objective's own adds what it measures."""

    val_loss: float
    """Nats a term."""

    def as_record(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Return the scores in a record of as_record(), perhaps by way of JSON and among other keys."""
        kinds = {field.name: int if field.type == "int" else float for field in fields(cls)}
        return cls(**{name: kind(record[name]) for name, kind in kinds.items()})


class LossFunction(Protocol):
    """A model in use. Examples are rows as the dataset gives them, on the model's device."""

    def loss(self, examples: Tensor) -> Tensor:
        """Return the sum of the cross-entropies of all terms in nats, differentiable."""

    def logits(self, examples: Tensor) -> Tensor:
        """Return the model's output for the examples, in any shape."""

    def sums(self, examples: Tensor) -> Tensor:
        """Return a float64 vector that is added up over batches and ranks for `Objective.summarize`."""


class Objective(Protocol):
    """The code that makes, trains and scores the models of one profile."""

    adapter_task: str | None
    """peft's task_type."""

    evaluation: type[Evaluation]
    sums: int
    """Length of LossFunction.sums."""

    def open_data(self, directory: Path, split: Literal["train", "val"]) -> ExampleDataset:
        """Open one split of a fetched dataset. Raises DataError for a dataset of another kind."""

    def build_model(self, manifest: DatasetManifest) -> nn.Module:
        """Return the model of a run without a parent, in float32: random by the profile's seed, or pretrained."""

    def model_skeleton(self, manifest: DatasetManifest) -> nn.Module:
        """Return the same model without values: all its tensors are on torch's meta device."""

    def load_pretrained(self) -> nn.Module:
        """Return the model that model.pretrained names, if it can be trained so; no tokenizer is looked at."""

    def load_model(self, directory: Path) -> nn.Module:
        """Return the model of a checkpoint, as any user of it would load it."""

    def load_skeleton(self, directory: Path) -> nn.Module:
        """Return the same model without values."""

    def check_fits(self, model: nn.Module, manifest: DatasetManifest) -> None:
        """Refuse a model that cannot take the dataset's examples."""

    def prepare_for_training(self, model: nn.Module) -> None:
        """Make the model faster without changing a bit."""

    def loss_function(self, model: nn.Module, manifest: DatasetManifest) -> LossFunction:
        """Return the model put to use; it may be wrapped, moved, rounded or sharded before or after."""

    def terms(self, examples: int) -> int:
        """Return the cross-entropies in the loss of so many training examples: the terms of its mean."""

    def guessing_loss(self, manifest: DatasetManifest) -> float:
        """Return the mean loss in nats of holding every answer equally likely."""

    def summarize(self, sums: Sequence[float], data: ExampleDataset) -> Evaluation:
        """Return the scores behind the sums over all scored examples of a split."""

    def sample(
        self, model: nn.Module, checkpoint_directory: Path, manifest: DatasetManifest, device: torch.device
    ) -> list[dict[str, str]]:
        """Return prompt and text of samples of a checkpoint's model; [] if it makes nothing to look at."""
