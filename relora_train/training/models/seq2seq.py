"""A text from a text, by transformers' T5 or another encoder with a decoder: teacher forcing, exact match, loss.

The encoder reads the source, the decoder predicts each token of the target from those before it. Rows are padded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import ExampleDataset
from relora_train.data.padded_dataset import PADDING, PromptPairs
from relora_train.training.models.base import Evaluation
from relora_train.training.models.text import TextObjective


class TargetEvaluation(Evaluation):
    """Loss over val_target_tokens tokens of val_examples targets, and the share of these that are met exactly."""

    val_exact_match: float
    """Greedy decoding would give the target, from its first token to the end of the text."""

    val_target_tokens: int
    val_examples: int


class TargetLoss:
    """The LossFunction of targets. Examples are rows of PromptPairs (examples, source length + target length)."""

    def __init__(self, model: nn.Module, source_length: int) -> None:
        config = cast(Any, model).config
        self._model, self._source_length = model, source_length
        self._pad = config.pad_token_id or 0
        begin = config.decoder_start_token_id
        self._begin = self._pad if begin is None else begin

    def terms(self, examples: Tensor) -> Tensor:
        return (self._targets(examples) != PADDING).sum()

    def loss(self, examples: Tensor) -> Tensor:
        return self._nats(self.logits(examples), self._targets(examples))

    def logits(self, examples: Tensor) -> Tensor:
        """Return logits (examples, target length, vocabulary), each given the target's tokens before it."""
        source, targets = examples[:, : self._source_length], self._targets(examples)
        there = source != PADDING
        before = torch.cat([torch.full_like(targets[:, :1], self._begin), targets[:, :-1]], dim=1)
        output = self._model(
            input_ids=source.masked_fill(~there, self._pad),
            attention_mask=there.long(),
            decoder_input_ids=before.masked_fill(before == PADDING, self._pad),  # padding comes last: nobody reads it
            use_cache=False,
        )
        return cast(Tensor, output.logits)

    def sums(self, examples: Tensor) -> Tensor:
        """Return nats, tokens, targets that are met exactly, and examples.

        Greedy decoding gives a target if and only if each of its tokens is the likeliest after those before it: so one
        pass with the target's own tokens tells.
        """
        logits, targets = self.logits(examples), self._targets(examples)
        met = ((logits.argmax(dim=-1) == targets) | (targets == PADDING)).all(dim=1).sum()
        counts = torch.stack([(targets != PADDING).sum(), met, torch.tensor(len(targets), device=met.device)])
        return torch.cat([self._nats(logits, targets).double().reshape(1), counts.double()])

    def _targets(self, examples: Tensor) -> Tensor:
        return examples[:, self._source_length :]

    def _nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        rows = logits.flatten(0, 1).float()
        return F.cross_entropy(rows, targets.flatten(), ignore_index=PADDING, reduction="sum")


class Seq2Seq(TextObjective):
    """The Objective of targets."""

    adapter_task = "SEQ_2_SEQ_LM"
    evaluation = TargetEvaluation
    sums = 4

    def open_data(self, directory: Path, split: Literal["train", "val"]) -> ExampleDataset:
        batch = self.profile.batch
        return PromptPairs(
            directory,
            split,
            sequence_length=batch.sequence_length,
            target_length=batch.target_length or batch.sequence_length,
            seed=self.profile.seed,
            too_long=batch.too_long,
        )

    def new_model(self, manifest: DatasetManifest) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        model = self.profile.model
        config = T5Config(
            vocab_size=model.vocab_size or manifest.vocab_size,
            d_model=model.hidden_size,
            d_ff=model.intermediate_size,
            d_kv=model.head_size,
            num_layers=model.num_hidden_layers,
            num_heads=model.num_attention_heads,
            dropout_rate=0.0,  # as our other new models; a pretrained one keeps its own
            tie_word_embeddings=True,  # an own head would begin with logits of the width's size
            pad_token_id=manifest.eos_id,
            eos_token_id=manifest.eos_id,
            decoder_start_token_id=manifest.eos_id,
        )
        return cast(nn.Module, T5ForConditionalGeneration(config))

    def loss_function(self, model: nn.Module, manifest: DatasetManifest) -> TargetLoss:
        return TargetLoss(model, self.profile.batch.sequence_length)

    def summarize(self, sums: Sequence[float], data: ExampleDataset) -> TargetEvaluation:
        nats, tokens, met, examples = sums
        return TargetEvaluation(
            val_loss=nats / max(1, tokens),
            val_exact_match=met / examples,
            val_target_tokens=int(tokens),
            val_examples=int(examples),
        )
