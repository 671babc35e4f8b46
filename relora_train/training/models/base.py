"""The work of an objective for the trainer: make the model, read examples, compute the loss, score, sample.

An example is one row of integers, a batch (examples, row length) of them: text is token ids, an image its pixels and
its class. So data order, shares of ranks, micro-batches and resuming are the same for all (dataset.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol, cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import ExampleDataset
from relora_train.distributed import Ranks
from relora_train.settings.profile import Profile
from relora_train.training.models.pretrained import load_model, load_skeleton
from relora_train.training.models.registry import facts_of


class Evaluation(BaseModel):
    """Scores of a model on held-out examples; an objective's own adds what it measures. Other keys are passed over."""

    val_loss: float
    """Nats a term."""


class LossFunction(Protocol):
    """A model in use. Examples are rows as the dataset gives them, on the model's device.

    A mean is the loss of a whole batch over its terms: the sums over micro-batches and ranks, one divided by the other.
    """

    def terms(self, examples: Tensor) -> Tensor:
        """Return the number of cross-entropies in the loss of the examples, an integer where they are: also the CPU."""

    def loss(self, examples: Tensor) -> Tensor:
        """Return the sum of the cross-entropies of all terms in nats, differentiable."""

    def logits(self, examples: Tensor) -> Tensor:
        """Return the model's output for the examples, in any shape."""

    def sums(self, examples: Tensor) -> Tensor:
        """Return a float64 vector that is added up over batches and ranks for `Objective.summarize`."""


class Objective(ABC):
    """The code that makes, trains and scores the models of one profile."""

    adapter_task: ClassVar[str | None]
    """peft's task_type."""

    evaluation: ClassVar[type[Evaluation]]
    sums: ClassVar[int]
    """Length of LossFunction.sums, unless `sums_for` says otherwise."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.kind = profile, facts_of(profile).kind

    def sums_for(self, manifest: DatasetManifest) -> int:
        """Return the length of LossFunction.sums for a dataset."""
        return self.sums

    @abstractmethod
    def open_data(self, directory: Path, split: Literal["train", "val"]) -> ExampleDataset:
        """Open one split of a fetched dataset. Raises DataError for a dataset of another kind."""

    @abstractmethod
    def new_model(self, manifest: DatasetManifest) -> nn.Module:
        """Return a model as the profile describes it, with random weights."""

    def build_model(self, manifest: DatasetManifest) -> nn.Module:
        """Return the model of a run without a parent, in float32: random by the profile's seed, or pretrained."""
        if self.profile.model.pretrained is not None:
            return self.load_pretrained(manifest)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.profile.seed)
            return self.new_model(manifest).float()

    def load_pretrained(self, manifest: DatasetManifest | None = None) -> nn.Module:
        """Return the model that model.pretrained names; without a dataset it is to be looked at only."""
        model = self.profile.model
        return load_model(cast(str, model.pretrained), revision=model.revision, kind=self.kind)

    def load_model(self, directory: Path) -> nn.Module:
        """Return the model of a checkpoint, as any user of it would load it."""
        return load_model(directory, kind=self.kind)

    def load_base(self, directory: Path, model: nn.Module) -> nn.Module:
        """Return the model that an adapter of `model` belongs on, a checkpoint's or a pretrained one."""
        return self.load_model(directory)

    def load_skeleton(self, directory: Path) -> nn.Module:
        """Return the same model without values."""
        return load_skeleton(directory, kind=self.kind)

    @abstractmethod
    def check_fits(self, model: nn.Module, manifest: DatasetManifest | None) -> None:
        """Refuse a model that cannot take the dataset's examples, or, before there is one, that cannot be trained."""

    def prepare_for_training(self, model: nn.Module) -> None:  # noqa: B027 (most models need nothing)
        """Make the model faster without changing a bit."""

    @abstractmethod
    def stem(self, model: nn.Module) -> nn.Module:
        """Return the module whose output the first block reads."""

    @abstractmethod
    def loss_function(self, model: nn.Module, manifest: DatasetManifest) -> LossFunction:
        """Return the model put to use; it may be wrapped, moved, rounded or sharded before or after."""

    @abstractmethod
    def guessing_loss(self, manifest: DatasetManifest) -> float:
        """Return the mean loss in nats of holding every answer equally likely."""

    @abstractmethod
    def summarize(self, sums: Sequence[float], data: ExampleDataset) -> Evaluation:
        """Return the scores behind the sums over all scored examples of a split."""

    def sample(
        self, model: nn.Module, checkpoint_directory: Path, manifest: DatasetManifest, ranks: Ranks
    ) -> list[dict[str, str]]:
        """Return prompt and text of samples of a checkpoint's model; [] if it makes nothing to look at.

        Ranks that share the model call together, and each gets them.
        """
        return []
