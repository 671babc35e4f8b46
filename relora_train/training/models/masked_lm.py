"""Prediction of hidden tokens, as BERT is trained: ids in, cross-entropy of each hidden token, their perplexity out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import ExampleDataset
from relora_train.data.masking import UNHIDDEN, Masking
from relora_train.data.tokenizer import find_mask_id
from relora_train.errors import ModelUnsuitableError
from relora_train.training.models.base import Evaluation
from relora_train.training.models.model import evaluating, probe_tokens
from relora_train.training.models.text import TextObjective, new_bert, perplexity


class MaskedEvaluation(Evaluation):
    """Loss over val_masked_tokens hidden tokens, and the same as perplexity."""

    val_masked_perplexity: float
    val_masked_tokens: int


class HiddenTokenLoss:
    """The LossFunction of hidden tokens. Examples are inputs and targets (sequences, 2 * length), UNHIDDEN or an id.

    Refuses a model whose tokens do not read those after them.
    """

    def __init__(self, model: nn.Module) -> None:
        check_looks_ahead(model)
        self._model = model

    def terms(self, examples: Tensor) -> Tensor:
        return (_targets(examples) != UNHIDDEN).sum()

    def loss(self, examples: Tensor) -> Tensor:
        scores, targets = self.logits(examples).flatten(0, 1), _targets(examples).flatten()
        return F.cross_entropy(scores.float(), targets, ignore_index=UNHIDDEN, reduction="sum")

    def logits(self, examples: Tensor) -> Tensor:
        """Return logits (sequences, length, vocabulary)."""
        return cast(Tensor, self._model(input_ids=examples[:, : examples.shape[1] // 2]).logits)

    def sums(self, examples: Tensor) -> Tensor:
        """Return nats and hidden tokens."""
        return torch.stack([self.loss(examples).double(), self.terms(examples).double()])


def _targets(examples: Tensor) -> Tensor:
    return examples[:, examples.shape[1] // 2 :]


@torch.no_grad()
def check_looks_ahead(model: nn.Module) -> None:
    """Refuse a model whose logits do not depend on tokens that come later. Raises ModelUnsuitableError."""
    tokens = probe_tokens(model, rows=1)
    changed = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)
    with evaluating(model):
        before, after = (cast(Tensor, model(input_ids=ids).logits)[:, 0].float() for ids in (tokens, changed))
    if torch.equal(before, after):
        raise ModelUnsuitableError(
            f"A token of this {type(model).__name__} does not read those after it, and objective 'masked_lm' fills "
            "gaps from both sides. Its config.json may make it a decoder (is_decoder = true). Give an encoder, or set "
            "objective to 'causal_lm'."
        )


class MaskedLM(TextObjective):
    """The Objective of hidden tokens."""

    adapter_task = None  # peft has no name for it and wraps any model without one
    evaluation = MaskedEvaluation
    sums = 2

    def open_data(self, directory: Path, split: Literal["train", "val"]) -> ExampleDataset:
        data = super().open_data(directory, split)
        mask_id, known = find_mask_id(directory, self.profile.tokenizer.mask_token), data.manifest
        data.masking = Masking(mask_id, known.vocab_size, (mask_id, known.eos_id, *known.bos_ids))
        return data

    def new_model(self, manifest: DatasetManifest) -> nn.Module:
        from transformers import BertForMaskedLM

        return new_bert(self.profile, BertForMaskedLM, manifest)

    def check_fits(self, model: nn.Module, manifest: DatasetManifest | None) -> None:
        """Refuse what no text fits, and before there is a loss function, a model that does not look ahead."""
        super().check_fits(model, manifest)
        if manifest is None:
            check_looks_ahead(model)

    def loss_function(self, model: nn.Module, manifest: DatasetManifest) -> HiddenTokenLoss:
        return HiddenTokenLoss(model)

    def summarize(self, sums: Sequence[float], data: ExampleDataset) -> MaskedEvaluation:
        loss = sums[0] / max(1, sums[1])
        return MaskedEvaluation(val_loss=loss, val_masked_perplexity=perplexity(loss), val_masked_tokens=int(sums[1]))
