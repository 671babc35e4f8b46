"""Next-token prediction: token ids in, cross-entropy of every next token, perplexity and bits per byte out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset import ExampleDataset, TokenDataset
from relora_train.settings.profile import Profile
from relora_train.training.models.base import Evaluation
from relora_train.training.models.model import (
    attend_without_mask,
    build_model,
    check_causal,
    check_fits,
    head_is_plain,
    logits,
    model_skeleton,
    next_token_loss,
)
from relora_train.training.models.pretrained import load_model, load_skeleton

_SAMPLE_TEMPERATURE = 0.8
_SAMPLE_TOP_K = 40
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class TextEvaluation(Evaluation):
    """Loss over val_tokens predicted tokens, and the same as perplexity and as bits per byte of the text."""

    val_perplexity: float
    bits_per_byte: float
    val_tokens: int


class NextTokenLoss:
    """The LossFunction of text. Examples are token ids (sequences, length + 1). Refuses a model that looks ahead."""

    def __init__(self, model: nn.Module) -> None:
        check_causal(model)
        self._model, self._fused = model, head_is_plain(model)

    def loss(self, examples: Tensor) -> Tensor:
        return next_token_loss(self._model, examples, fused=self._fused)

    def logits(self, examples: Tensor) -> Tensor:
        return logits(self._model, examples[:, :_PROBE_TOKENS])

    def sums(self, examples: Tensor) -> Tensor:
        """Return nats and tokens."""
        nats = self.loss(examples).double()
        return torch.stack([nats, nats.new_tensor(examples[:, 1:].numel())])


class CausalLM:
    """The Objective of text."""

    adapter_task: str | None = "CAUSAL_LM"
    evaluation: type[Evaluation] = TextEvaluation
    sums = 2

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def open_data(self, directory: Path, split: Literal["train", "val"]) -> ExampleDataset:
        length, seed = self._profile.batch.sequence_length, self._profile.seed
        return TokenDataset(directory, split, sequence_length=length, seed=seed)

    def build_model(self, manifest: DatasetManifest) -> nn.Module:
        return build_model(
            self._profile.model,
            vocab_size=manifest.vocab_size,
            eos_id=manifest.eos_id,
            sequence_length=self._profile.batch.sequence_length,
            seed=self._profile.seed,
        )

    def model_skeleton(self, manifest: DatasetManifest) -> nn.Module:
        return model_skeleton(self._profile.model, vocab_size=manifest.vocab_size, eos_id=manifest.eos_id)

    def load_pretrained(self) -> nn.Module:
        model = load_model(cast(str, self._profile.model.pretrained), revision=self._profile.model.revision)
        check_fits(model, vocab_size=0, sequence_length=self._profile.batch.sequence_length)
        check_causal(model)
        return model

    def load_model(self, directory: Path) -> nn.Module:
        return load_model(directory)

    def load_skeleton(self, directory: Path) -> nn.Module:
        return load_skeleton(directory)

    def check_fits(self, model: nn.Module, manifest: DatasetManifest) -> None:
        check_fits(model, vocab_size=manifest.vocab_size, sequence_length=self._profile.batch.sequence_length)

    def prepare_for_training(self, model: nn.Module) -> None:
        attend_without_mask(model)

    def loss_function(self, model: nn.Module, manifest: DatasetManifest) -> NextTokenLoss:
        return NextTokenLoss(model)

    def terms(self, examples: int) -> int:
        return examples * self._profile.batch.sequence_length

    def guessing_loss(self, manifest: DatasetManifest) -> float:
        return math.log(manifest.vocab_size)

    def summarize(self, sums: Sequence[float], data: ExampleDataset) -> TextEvaluation:
        return summarize(sums[0], int(sums[1]), cast(TokenDataset, data).bytes_per_token)

    def sample(
        self, model: nn.Module, checkpoint_directory: Path, manifest: DatasetManifest, device: torch.device
    ) -> list[dict[str, str]]:
        evaluation = self._profile.evaluation
        return sample_texts(
            model,
            checkpoint_directory / "tokenizer.json",
            evaluation.sample_prompts,
            tokens=evaluation.sample_tokens,
            seed=self._profile.seed,
            device=device,
            bos_ids=manifest.bos_ids,
            eos_id=manifest.eos_id,
        )


def summarize(total_nats: float, tokens: int, bytes_per_token: float) -> TextEvaluation:
    """Return token-weighted means. If exp overflows, perplexity is infinite, never an error."""
    loss = total_nats / tokens
    return TextEvaluation(
        val_loss=loss,
        val_perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        val_tokens=tokens,
    )


@torch.no_grad()
def sample_texts(
    model: nn.Module,
    tokenizer_path: Path,
    prompts: Sequence[str],
    *,
    tokens: int,
    seed: int,
    device: torch.device,
    eos_id: int,
    bos_ids: Sequence[int] = (),
) -> list[dict[str, str]]:
    """Return a continuation of each prompt, drawn at a fixed temperature; the same for the same weights and seed.

    bos_ids: what documents began with in training, and so each prompt. An empty prompt is continued from there, or from
    eos_id, which ended the document before; of one that is too long for the model's positions the end is.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    positions = getattr(cast(Any, model).config, "max_position_embeddings", None) or 10**9
    tokens = min(tokens, positions - 1)
    samples = []
    for index, prompt in enumerate(prompts):
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        known = [*bos_ids, *prompt_ids] or [eos_id]
        ids = torch.tensor([known[-(positions - tokens) :]], device=device)
        torch.manual_seed(seed + index)
        output = cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=_SAMPLE_TEMPERATURE,
            top_k=_SAMPLE_TOP_K,
            pad_token_id=0,
        )
        samples.append({"prompt": prompt, "text": tokenizer.decode(output[0, ids.shape[1] :].tolist())})
    return samples
