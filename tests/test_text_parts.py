"""Models that also see: their part for text is trained alone, and is the same function of text."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stage_runs import run_all, tiny_profile
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from relora_train.settings.load import load_profile
from relora_train.training.models.pretrained import dtype_of_files, load_model, load_skeleton
from relora_train.training.models.registry import facts_of

VOCABULARY = 257  # bytes and the end of a text
SEEN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28}
READ = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def gemma3() -> nn.Module:
    text = Gemma3TextConfig(**READ, num_key_value_heads=2, head_dim=8, sliding_window=16)
    tokens = {"image_token_index": 200, "boi_token_index": 201, "eoi_token_index": 202, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**SEEN, patch_size=14), **tokens)
    )


def llava() -> nn.Module:
    vision = CLIPVisionConfig(**SEEN, patch_size=14, projection_dim=32)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**READ), vision_config=vision, image_token_index=200)
    )


@pytest.fixture(params=[gemma3, llava])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    make: Callable[[], nn.Module] = request.param
    model = make()
    model.save_pretrained(tmp_path / "whole")
    return model.eval(), tmp_path / "whole"


@torch.no_grad()
def test_the_part_for_text_gives_the_whole_one_s_logits(
    whole: tuple[nn.Module, Path], caplog: pytest.LogCaptureFixture
):
    model, directory = whole
    text = load_model(directory).eval()
    tokens = torch.randint(200, (2, 12))
    torch.testing.assert_close(text(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-5, atol=1e-6)
    assert "only the part for text is trained" in caplog.text
    assert not any("vision" in name for name, _ in text.named_parameters())
    assert [name for name, _ in load_skeleton(directory).named_parameters()] == [n for n, _ in text.named_parameters()]
    assert dtype_of_files(directory) == "float32"


def test_a_run_begins_from_it_and_leaves_a_model_of_text(whole: tuple[nn.Module, Path], dataset: Path, tmp_path: Path):
    profile = tiny_profile(model={"pretrained": str(whole[1])}, batch={"sequence_length": 16}, schedule={"cycles": 1})
    made = run_all(profile, dataset, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(made["cycle-1"])
    assert type(model).__name__ in ("Gemma3ForCausalLM", "LlamaForCausalLM")


def test_its_embedding_is_found_before_anything_is_loaded(whole: tuple[nn.Module, Path]):
    settings = [f"model.pretrained={whole[1]}", "tokenizer.train=true", "tokenizer.vocab_size=257"]
    facts_of(load_profile("smoke", settings)).check_pretrained()
