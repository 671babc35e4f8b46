"""Samples are the last thing that a run makes: nothing about them may end a training that is done."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stage_runs import ignore, tiny_profile
from tiny_data import VOCABULARY
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from relora_train.training.evaluate import evaluate_checkpoint
from relora_train.training.models.registry import objective_of
from relora_train.training.requests import EvaluationRequest

CPU = torch.device("cpu")


def test_an_empty_prompt_is_continued_from_the_end_of_a_document(
    dataset: Path, warm_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun: list[list[int]] = []
    generate = LlamaForCausalLM.generate

    def watched(model: Any, ids: torch.Tensor, **options: Any) -> Any:
        begun.append(ids[0].tolist())
        return generate(model, ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", watched)
    request = EvaluationRequest(
        profile=tiny_profile(evaluation={"sample_prompts": ("", "ab"), "sample_tokens": 4}),
        checkpoint_directory=warm_start,
        dataset_directory=dataset,
        result_path=tmp_path / "result.json",
        sequences=2,
    )
    evaluate_checkpoint(request, ignore)
    samples = json.loads((tmp_path / "result.json").read_text())["samples"]
    assert [sample["prompt"] for sample in samples] == ["", "ab"]
    assert begun[0] == [VOCABULARY - 1] and len(begun[1]) == 2  # the tiny tokenizer's end of a document; two bytes


@pytest.mark.parametrize(("prompt", "tokens"), [("a" * 40, 4), ("ab", 400), ("", 400), ("a" * 16, 16)])
def test_a_prompt_beyond_the_models_positions_is_no_end_of_a_run(dataset: Path, prompt: str, tokens: int):
    """Positions that are learned: there is no vector for the seventeenth."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    objective = objective_of(tiny_profile(evaluation={"sample_prompts": (prompt,), "sample_tokens": tokens}))
    (sample,) = objective.sample(model, dataset, SimpleNamespace(bos_ids=(), eos_id=VOCABULARY - 1), CPU)
    assert sample["prompt"] == prompt
