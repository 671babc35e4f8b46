"""Next-token prediction: token ids in, cross-entropy of every next token, perplexity and bits per byte out."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import ExampleDataset, TokenDataset
from relora_train.distributed import Ranks
from relora_train.training.models.base import Evaluation
from relora_train.training.models.documents import UNSCORED, documents_of_rows, ids_of_rows, targets_in_documents
from relora_train.training.models.model import (
    attend_without_mask,
    check_causal,
    check_documents,
    head_is_plain,
    logits,
    next_token_loss,
)
from relora_train.training.models.text import TextObjective, new_llama, perplexity

_SAMPLE_TEMPERATURE = 0.8
_SAMPLE_TOP_K = 40
_PROBE_TOKENS = 64


class TextEvaluation(Evaluation):
    """Loss over val_tokens predicted tokens, and the same as perplexity and as bits per byte of the text."""

    val_perplexity: float
    bits_per_byte: float
    val_tokens: int


class NextTokenLoss:
    """The LossFunction of text. Examples are token ids (sequences, length + 1). Refuses a model that looks ahead.

    end: id that ends documents, if a token is to be predicted from its own document alone. packed: rows may be of
    instructions, and then end is needed.
    """

    def __init__(self, model: nn.Module, end: int | None = None, *, packed: bool = False) -> None:
        check_causal(model)
        if end is not None:
            check_documents(model)
        self._model, self._fused, self._end, self._packed = model, head_is_plain(model), end, packed

    def terms(self, examples: Tensor) -> Tensor:
        if self._packed:
            return (documents_of_rows(examples, cast(int, self._end))[2] != UNSCORED).sum()
        if self._end is not None:
            return (targets_in_documents(examples, self._end) != UNSCORED).sum()
        return torch.tensor(examples[:, 1:].numel(), device=examples.device)

    def loss(self, examples: Tensor) -> Tensor:
        return next_token_loss(self._model, examples, fused=self._fused, end=self._end, packed=self._packed)

    def logits(self, examples: Tensor) -> Tensor:
        probe = examples[:, :_PROBE_TOKENS]
        return logits(self._model, ids_of_rows(probe) if self._packed else probe)

    def sums(self, examples: Tensor) -> Tensor:
        """Return nats and tokens."""
        return torch.stack([self.loss(examples).double(), self.terms(examples).double()])


class CausalLM(TextObjective):
    """The Objective of text."""

    adapter_task = "CAUSAL_LM"
    evaluation = TextEvaluation
    sums = 2

    def new_model(self, manifest: DatasetManifest) -> nn.Module:
        from transformers import LlamaForCausalLM

        return new_llama(self.profile, LlamaForCausalLM, manifest)

    def check_fits(self, model: nn.Module, manifest: DatasetManifest | None) -> None:
        """Refuse what no text fits, and before there is a loss function, a model that looks ahead."""
        super().check_fits(model, manifest)
        if manifest is None:
            check_causal(model)  # else the loss function does
            if self._apart:
                check_documents(model)

    @property
    def _apart(self) -> bool:
        return self.profile.batch.documents == "mask"

    def prepare_for_training(self, model: nn.Module) -> None:
        attend_without_mask(model)

    def loss_function(self, model: nn.Module, manifest: DatasetManifest) -> NextTokenLoss:
        packed = manifest.examples is not None
        return NextTokenLoss(model, manifest.eos_id if self._apart or packed else None, packed=packed)

    def summarize(self, sums: Sequence[float], data: ExampleDataset) -> TextEvaluation:
        loss, tokens = sums[0] / sums[1], int(sums[1])
        return TextEvaluation(
            val_loss=loss,
            val_perplexity=perplexity(loss),
            bits_per_byte=loss / math.log(2) / cast(TokenDataset, data).bytes_per_token,
            val_tokens=tokens,
        )

    def sample(
        self, model: nn.Module, checkpoint_directory: Path, manifest: DatasetManifest, ranks: Ranks
    ) -> list[dict[str, str]]:
        """Return a continuation of each prompt, the same for the same weights and seed."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(checkpoint_directory / "tokenizer.json"))
        positions = getattr(cast(Any, model).config, "max_position_embeddings", None) or 10**9
        tokens = min(self.profile.evaluation.sample_tokens, positions - 1)
        samples = []
        for index, prompt in enumerate(self.profile.evaluation.sample_prompts):
            # Documents began with bos_ids in training, so each prompt does; eos_id ended the document before.
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            known = [*manifest.bos_ids, *prompt_ids] or [manifest.eos_id]
            ids = torch.tensor([known[-(positions - tokens) :]], device=ranks.device)
            torch.manual_seed(self.profile.seed + index)
            with torch.no_grad():
                output = cast(Any, model).generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    do_sample=True,
                    temperature=_SAMPLE_TEMPERATURE,
                    top_k=_SAMPLE_TOP_K,
                    pad_token_id=0,
                    synced_gpus=ranks.sharded,  # a rank whose text has ended goes on lending its rows
                )
            samples.append({"prompt": prompt, "text": tokenizer.decode(output[0, ids.shape[1] :].tolist())})
        return samples
