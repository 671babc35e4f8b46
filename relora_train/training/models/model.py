"""A causal language model in use: its training loss without a matrix of all logits, its blocks, head and files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.errors import ModelError, ModelUnsuitableError
from relora_train.training.models.activations import EVALUATION_ROWS
from relora_train.training.models.chunked_loss import chunked_cross_entropy, loss_of_rows
from relora_train.training.models.documents import (
    attend_in_documents,
    documents_of_rows,
    flex_attention_works,
    mask_of_documents,
    places_in_documents,
    targets_in_documents,
)

_UNMASKED = "sdpa_without_mask"


def file_name(model: nn.Module, name: str) -> str:
    """Return the name of a tensor in the model's files, where transformers has another name for it than in memory.

    Raises ModelError where a file holds it in another form, merged with others or split.
    """
    from transformers.core_model_loading import revert_weight_conversion

    known: dict[str, str] | None = getattr(model, "file_names", None)
    if known is not None:
        return known[name]
    shape = cast(Any, model).get_parameter_or_buffer(name).shape
    written = revert_weight_conversion(cast(Any, model), {name: torch.empty(shape, device="meta")})
    if [tensor.shape for tensor in written.values()] != [shape]:
        raise ModelError(
            f"The files of a {type(model).__name__} hold {name} in another form than memory does, and "
            "launch.sharding = 'full' reads and writes tensors one by one. Use launch.sharding = 'none'."
        )
    return str(next(iter(written)))


def embedding(model: nn.Module) -> nn.Embedding:
    """Return the token embedding."""
    return cast(nn.Embedding, cast(Any, model).get_input_embeddings())


def head(model: nn.Module) -> nn.Linear:
    """Return the linear layer from hidden states to logits."""
    return cast(nn.Linear, cast(Any, model).get_output_embeddings())


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the equal blocks that transformers says a model consists of; none where it does not say."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def attend_without_mask(model: nn.Module) -> None:
    """Let a Llama or GPT-NeoX with plain causal attention make no mask: the same bits, and no look at the device.

    It still takes one: that of documents which are apart.

    Before making a mask transformers asks, in every forward pass, whether positions are packed: the host would wait
    for all the work it has given to a GPU. Other models and windowed attention stay as they are.
    """
    from transformers import AttentionInterface

    config = cast(Any, model).config
    windowed = getattr(config, "sliding_window", None) is not None
    if config.model_type in ("llama", "gpt_neox") and not windowed and config._attn_implementation == "sdpa":
        AttentionInterface.register(_UNMASKED, attend_in_documents)
        cast(Any, model).set_attn_implementation(_UNMASKED)


def round_residual(stem: nn.Module) -> None:
    """Round the stream that runs past the blocks to bfloat16 from its beginning on, in training only."""

    def rounded(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(torch.bfloat16) if module.training else output

    stem.register_forward_hook(rounded)


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the input of every block for the backward pass and compute the rest again: the same gradients."""
    try:
        cast(Any, model).activation_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        raise ModelError(
            f"transformers cannot checkpoint the activations of a {type(model).__name__}. "
            "Set launch.gradient_checkpointing to false; a lower batch.micro_sequences saves memory too."
        ) from None


def logits(model: nn.Module, inputs: Tensor, places: Tensor | None = None) -> Tensor:
    """Return logits (batch, length, vocabulary) of token ids (batch, length); for `places` see fused_loss."""
    return cast(Tensor, model(input_ids=inputs, use_cache=False, **_placed(model, places)).logits)


def next_token_loss(
    model: nn.Module, tokens: Tensor, *, fused: bool = True, end: int | None = None, packed: bool = False
) -> Tensor:
    """Return the sum of the cross-entropies in nats of tokens[:, 1:], each given the tokens before it.

    tokens: ids (batch, length + 1). fused: go from hidden states to the loss in chunks, so that the logits of the
    whole batch never exist; only for models whose head is a plain matrix (see `head_is_plain`).
    end: id that ends documents, if each is to be predicted from its own tokens alone; its first token then is not.
    packed: rows may be of instructions; see packed_dataset.py.
    """
    inputs, targets, places = tokens[:, :-1], tokens[:, 1:], None
    if packed:
        inputs, places, targets = documents_of_rows(tokens, cast(int, end))
    elif end is not None:
        places, targets = places_in_documents(inputs, end), targets_in_documents(tokens, end)
    targets = targets.reshape(-1)
    if not fused:
        scores = logits(model, inputs, places)
        return F.cross_entropy(scores.flatten(0, 1).float(), targets, reduction="sum")
    own = getattr(model, "fused_loss", None)  # a sharded model gathers its weights around its own methods only
    return cast(Tensor, own(inputs, targets, places) if own else fused_loss(model, inputs, targets, places))


def _placed(model: nn.Module, places: Tensor | None) -> dict[str, Any]:
    """Return the arguments that tell the model where documents begin. Others are masked by transformers, or here."""
    if places is None:
        return {}
    config = cast(Any, model).config
    if config._attn_implementation != _UNMASKED:
        return {"position_ids": places}
    # Flex attention is not compiled in evaluation, where it would keep the scores of all pairs, and has no dropout.
    by_blocks = model.training and not config.attention_dropout and flex_attention_works(places.device)
    return {"position_ids": places, "attention_mask": mask_of_documents(places, by_blocks=by_blocks)}


def fused_loss(model: nn.Module, inputs: Tensor, targets: Tensor, places: Tensor | None = None) -> Tensor:
    """Return the summed loss from token ids (batch, length) and flat targets, without all logits at once.

    places: of the tokens in their documents, (batch, length), if those are apart. Then targets may be UNSCORED.
    """
    found = _backbone(model)(input_ids=inputs, use_cache=False, **_placed(model, places))
    hidden = found.last_hidden_state.flatten(0, 1)  # (batch * length, hidden)
    weight: Tensor = head(model).weight
    bias: Tensor | None = head(model).bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled():
        of_rows = getattr(model, "loss_of_rows", loss_of_rows)
        return chunked_cross_entropy(hidden, weight, bias, targets, of_rows, partial=places is not None)
    total = torch.zeros((), device=hidden.device)  # in float32, also under autocast
    for rows, answers in zip(*(torch.split(t, EVALUATION_ROWS) for t in (hidden, targets)), strict=True):
        total += F.cross_entropy(F.linear(rows, weight, bias).float(), answers, reduction="sum")
    return total


def _backbone(model: nn.Module) -> nn.Module:
    """Return what lies below the head; the model itself if transformers names no such part."""
    base = cast(Any, model).base_model
    return cast(nn.Module, cast(Any, model).get_decoder() if base is model else base)


@torch.no_grad()
def head_is_plain(model: nn.Module) -> bool:
    """Return True if the fused loss equals the model's own on a short probe: no scaled or capped logits."""
    if not isinstance(head(model), nn.Linear) or _backbone(model) is model:
        return False
    probe = probe_tokens(model, rows=2)
    with evaluating(model):
        ours = next_token_loss(model, probe, fused=True)
        theirs = next_token_loss(model, probe, fused=False)
    return bool(torch.isclose(ours, theirs, rtol=1e-4))


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Refuse a model whose logits depend on tokens that come later: it would read what it is to predict.

    Two forward passes over one short sequence, of which the second half changes. Raises ModelUnsuitableError.
    """
    tokens = probe_tokens(model, rows=1)
    half = tokens.shape[1] // 2
    changed = torch.cat([tokens[:, :half], (tokens[:, half:] + 1) % embedding(model).num_embeddings], dim=1)
    with evaluating(model):
        before, after = logits(model, tokens)[:, :half].float(), logits(model, changed)[:, :half].float()
    if not bool(before.isfinite().all() & after.isfinite().all()):
        raise ModelUnsuitableError(
            f"The {type(model).__name__} gives logits that are not finite: its weights are broken."
        )
    moved = _moved(after, before)
    if moved > _rounding(model, before):  # an untrained BERT moves them by 2e-4, a trained one by 1
        raise ModelUnsuitableError(
            f"The logits of this {type(model).__name__} look ahead: other tokens later on change them by {moved:.2g} "
            "of the largest, so it would be trained on what it has to predict. It is an encoder, or its config.json "
            "makes it one (is_decoder = false). Give a model with causal attention."
        )


@torch.no_grad()
def check_documents(model: nn.Module) -> None:
    """Refuse a model whose logits depend on the document before, though it is told where each begins.

    A short document after another one, after a third one, and alone. Raises ModelUnsuitableError.
    """
    tokens = probe_tokens(model, rows=1)
    half = tokens.shape[1] // 2
    other = torch.cat([(tokens[:, :half] + 1) % embedding(model).num_embeddings, tokens[:, half:]], dim=1)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    places = torch.where(places < half, places, places - half).unsqueeze(0)
    with evaluating(model):
        alone = logits(model, tokens[:, half:]).float()
        moved = max(_moved(logits(model, joined, places)[:, half:].float(), alone) for joined in (tokens, other))
    if moved > _rounding(model, alone):
        raise ModelUnsuitableError(
            f"This {type(model).__name__} does not take documents apart: the one before changes logits by {moved:.2g} "
            "of the largest. Its attention masks nothing by position_ids, or it is recurrent. Set batch.documents to "
            "'join'."
        )


def _moved(found: Tensor, expected: Tensor) -> float:
    """Return the largest deviation, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _rounding(model: nn.Module, found: Tensor) -> float:
    """Return the largest relative change of logits that rounding explains; experts sort their tokens anew."""
    exact = found.device.type == "cpu" and all(parameter.dtype != torch.bfloat16 for parameter in model.parameters())
    return 1e-5 if exact else 1e-2


def probe_tokens(model: nn.Module, *, rows: int) -> Tensor:
    """Return token ids (rows, 9), spread over the vocabulary."""
    table = embedding(model)
    return (torch.arange(rows * 9, device=table.weight.device) * 7919 % table.num_embeddings).reshape(rows, 9)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode, then put it back into its own."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
