"""Held-out loss of a model, token-weighted, and the process that scores a committed checkpoint and samples from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from relora_train.compiling import without_compiling
from relora_train.config import PrecisionConfig, Profile
from relora_train.dataset import TokenDataset
from relora_train.model import head_is_plain, load_model, next_token_loss
from relora_train.process import Emit, serve_request
from relora_train.ranks import Ranks, joined_ranks
from relora_train.requests import EvaluationRequest
from relora_train.torch_settings import configure_torch

_SAMPLE_TEMPERATURE = 0.8
_SAMPLE_TOP_K = 40


@dataclass(frozen=True)
class Evaluation:
    """Loss over val_tokens predicted tokens, and the same as perplexity and as bits per byte of the text."""

    val_loss: float
    """Nats per token."""

    val_perplexity: float
    bits_per_byte: float
    val_tokens: int

    def as_record(self) -> dict[str, float]:
        return asdict(self)


def summarize(total_nats: float, tokens: int, bytes_per_token: float) -> Evaluation:
    """Token-weighted means. Perplexity is infinite where exp overflows, never an error."""
    loss = total_nats / tokens
    return Evaluation(
        val_loss=loss,
        val_perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        val_tokens=tokens,
    )


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    dataset: TokenDataset,
    *,
    sequences: int,
    batch_sequences: int,
    precision: PrecisionConfig,
    ranks: Ranks,
    fused: bool,
) -> Evaluation:
    """Score `sequences` blocks spread evenly over the validation split, or all; the same for any batch size.

    Sums in float64, so batches of unequal size weigh by their tokens. Leaves the model's mode as it was.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # nats, tokens
    count = min(sequences, dataset.blocks)
    for first in range(0, count, ranks.world_size * batch_sequences):
        start = first + ranks.rank * batch_sequences
        idle = start >= count
        if idle and not ranks.sharded:
            break
        blocks = dataset.read_spread(0 if idle else start, 1 if idle else min(batch_sequences, count - start), of=count)
        tokens = torch.from_numpy(blocks).to(ranks.device)
        with autocast(precision, ranks.device), without_compiling():
            nats = next_token_loss(model, tokens, fused=fused)
        if idle:  # it only lent its rows to the others
            continue
        sums += torch.stack([nats.double(), torch.tensor(float(tokens[:, 1:].numel())).to(nats.device)]).double()
    ranks.sum(sums)
    model.train(was_training)
    return summarize(float(sums[0]), int(sums[1]), dataset.bytes_per_token)


def autocast(precision: PrecisionConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which forward passes of a profile run."""
    if precision.computes_in_bfloat16:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def sample_texts(
    model: nn.Module, tokenizer_path: Path, prompts: Sequence[str], *, tokens: int, seed: int, device: torch.device
) -> list[dict[str, str]]:
    """A continuation of each prompt, drawn at a fixed temperature; the same for the same weights and seed."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    samples = []
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids], device=device)
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


def evaluate_checkpoint(request: EvaluationRequest, emit: Emit) -> None:
    """Score a checkpoint through plain `from_pretrained`, as any user of it would load it, and sample from it."""
    profile = request.profile
    configure_torch(profile)
    with joined_ranks(profile.launch.device) as ranks:
        model = load_model(request.checkpoint_directory).to(ranks.device)
        dataset = TokenDataset(request.dataset_directory, "val", sequence_length=profile.batch.sequence_length)
        evaluation = evaluate_model(
            model,
            dataset,
            sequences=request.sequences,
            batch_sequences=profile.evaluation.batch_sequences,
            precision=profile.precision,
            ranks=ranks,
            fused=head_is_plain(model),
        )
        result = {**evaluation.as_record(), "samples": _samples(model, profile, request, ranks)}
        if ranks.is_first:
            request.result_path.write_text(json.dumps(result))
            emit("evaluation", **evaluation.as_record())


def _samples(model: nn.Module, profile: Profile, request: EvaluationRequest, ranks: Ranks) -> list[dict[str, str]]:
    return sample_texts(
        model,
        request.checkpoint_directory / "tokenizer.json",
        profile.evaluation.sample_prompts,
        tokens=profile.evaluation.sample_tokens,
        seed=profile.seed,
        device=ranks.device,
    )


if __name__ == "__main__":
    serve_request(EvaluationRequest, evaluate_checkpoint)
