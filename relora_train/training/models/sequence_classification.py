"""Classification of texts and pairs of texts: ids and padding in, cross-entropy of the class, accuracy and F1 out.

Encoders tell the class where transformers' own head does, decoders at a text's last token. Rows are padded at the end.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.checkpoints.example_format import ExampleFormat
from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import ExampleDataset
from relora_train.data.padded_dataset import PADDING, LabelledTexts
from relora_train.errors import ModelError
from relora_train.training.models.base import Evaluation
from relora_train.training.models.pretrained import NewHead, load_model
from relora_train.training.models.text import TextObjective, new_llama


class ClassEvaluation(Evaluation):
    """Mean loss over val_examples examples, and what the confusion of classes comes to."""

    val_accuracy: float
    val_f1: float
    """The second class's F1 where there are two; otherwise the mean over classes that are there or answered."""

    val_matthews: float
    """Matthews correlation: 1 is perfect, 0 what a constant answer has."""

    val_examples: int


class LabelLoss:
    """The LossFunction of labelled texts. Examples are rows of LabelledTexts (examples, length + 1)."""

    def __init__(self, model: nn.Module, form: ExampleFormat) -> None:
        config = cast(Any, model).config
        self._model, self._classes = model, len(form.classes)
        self._pad = config.get_text_config().pad_token_id or 0
        typed = form.pairs and (getattr(config, "type_vocab_size", None) or 0) > 1
        self._between = form.between[0] if typed else None

    def terms(self, examples: Tensor) -> Tensor:
        return torch.tensor(len(examples), device=examples.device)

    def loss(self, examples: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(examples).float(), examples[:, -1], reduction="sum")

    def logits(self, examples: Tensor) -> Tensor:
        """Return logits (examples, classes)."""
        ids = examples[:, :-1]
        there = ids != PADDING
        types = {}
        if self._between is not None:  # 1 from behind the first separator on
            separates = (ids == self._between).long()
            types["token_type_ids"] = ((separates.cumsum(1) - separates) > 0).long() * there
        ids = ids.masked_fill(~there, self._pad)
        return cast(Tensor, self._model(input_ids=ids, attention_mask=there.long(), **types).logits)

    def sums(self, examples: Tensor) -> Tensor:
        """Return nats, and the number of examples by class and answer, (1 + classes * classes)."""
        logits, classes = self.logits(examples).float(), examples[:, -1]
        nats = F.cross_entropy(logits, classes, reduction="sum").double()
        cells = classes * self._classes + logits.argmax(dim=-1)
        return torch.cat([nats.reshape(1), torch.bincount(cells, minlength=self._classes**2).double()])


class SequenceClassification(TextObjective):
    """The Objective of labelled texts."""

    adapter_task = "SEQ_CLS"
    evaluation = ClassEvaluation

    def sums_for(self, manifest: DatasetManifest) -> int:
        return 1 + len(_form(manifest).classes) ** 2

    def open_data(self, directory: Path, split: Literal["train", "val"]) -> ExampleDataset:
        batch = self.profile.batch
        return LabelledTexts(
            directory, split, sequence_length=batch.sequence_length, seed=self.profile.seed, too_long=batch.too_long
        )

    def new_model(self, manifest: DatasetManifest) -> nn.Module:
        from transformers import LlamaForSequenceClassification

        return new_llama(self.profile, LlamaForSequenceClassification, manifest, self._head(manifest))

    def load_pretrained(self, manifest: DatasetManifest | None = None) -> nn.Module:
        """Return the model with a head for the dataset's classes: its own if it fits, else one drawn by the seed."""
        model = self.profile.model
        place, head = cast(str, model.pretrained), self._head(manifest)
        return load_model(place, revision=model.revision, kind=self.kind, head=head)

    def load_base(self, directory: Path, model: nn.Module) -> nn.Module:
        config = cast(Any, model).config
        head = NewHead(self.profile.seed, tuple(config.id2label.values()), config.pad_token_id)
        return load_model(directory, kind=self.kind, head=head)

    def _head(self, manifest: DatasetManifest | None) -> NewHead:
        classes, pad_id = (None, 0) if manifest is None else (_form(manifest).classes, manifest.eos_id)
        return NewHead(self.profile.seed, classes, pad_id)

    def check_fits(self, model: nn.Module, manifest: DatasetManifest | None) -> None:
        """Refuse what no text fits, and a head for another number of classes."""
        super().check_fits(model, manifest)
        found = cast(Any, model).config.num_labels
        if manifest is not None and found != (wanted := len(_form(manifest).classes)):
            raise ModelError(
                f"The model tells {found} classes apart, and the dataset has {wanted}. A run "
                "goes on with the classes it began with. Give examples of the same, or begin a new run."
            )

    def loss_function(self, model: nn.Module, manifest: DatasetManifest) -> LabelLoss:
        return LabelLoss(model, _form(manifest))

    def guessing_loss(self, manifest: DatasetManifest) -> float:
        return math.log(len(_form(manifest).classes))

    def summarize(self, sums: Sequence[float], data: ExampleDataset) -> ClassEvaluation:
        confusion = torch.tensor(sums[1:], dtype=torch.float64).reshape(2 * [len(_form(data.manifest).classes)])
        examples, right = float(confusion.sum()), confusion.diagonal()
        are, said = confusion.sum(1), confusion.sum(0)  # by class: how many there are, how many answers name it
        f1 = 2 * right / (are + said).clamp_min(1)
        spread = math.sqrt(float(examples**2 - (are**2).sum()) * float(examples**2 - (said**2).sum()))
        together = float(right.sum() * examples - (are * said).sum())
        return ClassEvaluation(
            val_loss=sums[0] / examples,
            val_accuracy=float(right.sum()) / examples,
            val_f1=float(f1[1] if len(f1) == 2 else f1[are + said > 0].mean()),
            val_matthews=together / spread if spread else 0.0,
            val_examples=int(examples),
        )


def _form(manifest: DatasetManifest) -> ExampleFormat:
    return cast(ExampleFormat, manifest.examples)  # LabelledTexts refuses a dataset without
