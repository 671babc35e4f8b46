"""The counted memory of a micro-batch beside what torch keeps and makes for real models of every family."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from tiny_models import COMPILER_WARNINGS, saved_bytes
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from relora_train.method.bfloat16_adamw import round_trained_matrices
from relora_train.method.fast_path import HashMasks, share_inputs
from relora_train.method.layer import relora_layers
from relora_train.method.wrap import apply_relora
from relora_train.settings.method import TrainConfig
from relora_train.settings.profile import Profile
from relora_train.training.models.activations import Activations, activations
from relora_train.training.models.compiling import compile_blocks
from relora_train.training.models.model import (
    attend_without_mask,
    checkpoint_activations,
    embedding,
    next_token_loss,
    round_residual,
)
from relora_train.training.models.shape import wrapped_layers
from relora_train.training.models.shape_of_config import shape_of_config

pytestmark = COMPILER_WARNINGS

SEQUENCES, LENGTH, VOCABULARY, RANK = 16, 64, 300, 16
SIZES = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama() -> nn.Module:
    config = LlamaConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=False)
    return LlamaForCausalLM(config)


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=LENGTH))


def vit() -> nn.Module:
    config = ViTConfig(**SIZES, image_size=16, patch_size=2, num_channels=1, num_labels=10, attn_implementation="sdpa")
    return ViTForImageClassification(config)


class Case:
    """A model as build.py makes it ready, and what is counted for it."""

    def __init__(self, make: Callable[[], nn.Module], low_rank: bool, launch: dict[str, Any], **precision: str) -> None:
        torch.manual_seed(0)
        self.model = make().train()
        settings = {"launch": {"device": "cpu", "compile": False, **launch}, "precision": precision}
        batch = {"sequences": SEQUENCES, "sequence_length": LENGTH}
        self.profile = Profile.model_validate({"batch": batch, "relora": {"rank": RANK}, **settings})
        shape = shape_of_config(self.model.config.to_dict(), "the model")
        wrapped = wrapped_layers(shape, target_modules=None, rank=RANK) if low_rank else ()
        self.counted: Activations = activations(self.profile, shape, wrapped, device="cpu")
        self.classifies = shape.classifies
        if low_rank:
            self._wrap()
        if self.profile.precision.trains_in_bfloat16:
            round_trained_matrices(self.model)
        if not self.classifies:
            attend_without_mask(self.model)
            if self.profile.precision.residual == "bfloat16":
                round_residual(embedding(self.model))
        if self.profile.launch.gradient_checkpointing:
            checkpoint_activations(self.model)
        if self.profile.launch.compile:
            torch._dynamo.reset()
            recompute = self.profile.launch.recompute_elementwise
            compile_blocks(self.model, recompute=recompute, backend="aot_eager_decomp_partition")
        elif low_rank:
            share_inputs(self.model)

    def _wrap(self) -> None:
        apply_relora(self.model, rank=RANK, alpha=8, dropout=0.1, target_modules=None, seed=0)
        if self.profile.precision.computes_in_bfloat16:
            for _, layer in relora_layers(self.model):
                layer.weight.data = layer.weight.data.to(torch.bfloat16)
        self.masks = HashMasks(self.model)

    def loss(self) -> Tensor:
        rounded = self.profile.precision.computes_in_bfloat16
        context: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if rounded else nullcontext()
        with context:
            if self.classifies:
                return self.model(pixel_values=torch.ones(SEQUENCES, 1, 16, 16)).logits.float().sum()
            return next_token_loss(self.model, torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1)))


EAGER: dict[str, Any] = {}
CHECKPOINTED = {"gradient_checkpointing": True}
COMPILED = {"compile": True, "recompute_elementwise": False}
RECOMPUTED = {"compile": True}


BF16 = {"dtype": "bfloat16"}
EAGER_KINDS = [
    (llama, EAGER, {"dtype": "float32"}),
    (llama, EAGER, BF16),
    (llama, EAGER, {"dtype": "pure-bfloat16"}),
    (llama, EAGER, {**BF16, "residual": "bfloat16"}),
    (llama, CHECKPOINTED, {"dtype": "pure-bfloat16"}),
    (neox, EAGER, BF16),
    (vit, EAGER, BF16),
]
COMPILED_KINDS = [
    (llama, COMPILED, BF16, False),
    (llama, COMPILED, BF16, True),
    (llama, RECOMPUTED, {"dtype": "float32"}, False),
    (llama, RECOMPUTED, {**BF16, "residual": "bfloat16"}, True),
    (neox, COMPILED, {"dtype": "float32"}, False),
    (neox, RECOMPUTED, BF16, True),
    (vit, COMPILED, BF16, True),
    (vit, RECOMPUTED, BF16, True),
]


@pytest.mark.parametrize(
    ("make", "launch", "precision", "low_rank"),
    [*((*kind, low_rank) for kind in EAGER_KINDS for low_rank in (False, True)), *COMPILED_KINDS],
)
def test_what_is_kept_for_the_backward_pass_is_the_counted(make, launch, precision, low_rank):
    case = Case(make, low_rank, launch, **precision)
    assert case.counted.kept == pytest.approx(saved_bytes(case.model, case.loss), rel=0.06)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("launch", [EAGER, CHECKPOINTED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", [300, 5000])
def test_the_peak_of_a_micro_batch_is_the_counted(monkeypatch, vocabulary, dtype, launch, low_rank):
    """With gradients that are there already, as in all but the first micro-batch; the loss's peak, or a block's."""
    monkeypatch.setattr(f"{__name__}.VOCABULARY", vocabulary)
    case = Case(llama, low_rank, launch, dtype=dtype)
    with LiveBytes() as live:
        case.loss().backward()
        before, live.peak = live.now, 0
        case.loss().backward()
    assert sum(case.counted) == pytest.approx(live.peak - before, rel=0.2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_head_is_counted_without_a_gradient(monkeypatch, dtype):
    monkeypatch.setattr(f"{__name__}.VOCABULARY", 5000)
    case = Case(llama, True, EAGER, dtype=dtype)
    frozen = {"relora": case.profile.relora.model_copy(update={"train": TrainConfig(embeddings=False, head=False)})}
    shape = shape_of_config(case.model.config.to_dict(), "the model")
    wrapped = wrapped_layers(shape, target_modules=None, rank=RANK)
    counted = activations(case.profile.model_copy(update=frozen), shape, wrapped, device="cpu")
    for module in (case.model.lm_head, case.model.model.embed_tokens):
        module.weight.requires_grad_(False)
        module.weight.data = module.weight.data.to(getattr(torch, dtype))
    case.model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.float())
    assert counted.kept == pytest.approx(saved_bytes(case.model, case.loss), rel=0.06)
    with LiveBytes() as live:
        case.loss().backward()
        before, live.peak = live.now, 0
        case.loss().backward()
    assert sum(counted) == pytest.approx(live.peak - before, rel=0.2)
