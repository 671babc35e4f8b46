"""Real transformers models small enough for a unit test, and real training of them."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

VOCABULARY = 64

COMPILER_WARNINGS = pytest.mark.filterwarnings(
    "ignore:`torch.jit.:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",
)
"""A mark for tests that compile: torch warns of its own compiler."""


def tiny_llama(*, tie_word_embeddings: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=tie_word_embeddings,
        )
    )


def tiny_gpt_neox(*, seed: int = 0) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
        )
    )


def token_batch(*, seed: int = 0, sequences: int = 4, length: int = 16) -> Tensor:
    return torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, *, seed: int = 0) -> Tensor:
    """The loss on one batch, its gradients fresh in every parameter."""
    model.zero_grad(set_to_none=True)
    tokens = token_batch(seed=seed)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[int]) -> None:
    for seed in batches:
        backward(model, seed=seed)
        optimizer.step()


@torch.no_grad()
def logits(model: nn.Module, *, seed: int = 99) -> Tensor:
    """What the model says in eval mode, where dropout is off."""
    training = model.training
    model.eval()
    output = model(input_ids=token_batch(seed=seed)).logits
    model.train(training)
    return output


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
