"""Any causal language model of transformers can be wrapped, trained, merged, written, and adapted in peft's hands."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from families import FAMILIES, TARGETS, family_model, trial_of
from test_pretrained import bert, saved
from torch import nn
from transformers import BartConfig, BartForCausalLM

from relora_train.data.tokenizer import train_tokenizer
from relora_train.errors import ModelNotFoundError, ModelUnsuitableError, UntrainedLayerError
from relora_train.method.targets import check_targets
from relora_train.training.model_trial import try_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

_NO_LAYER = re.compile(r"gate\.weight|router(\.layer)?\.weight|conv(1d)?\.weight|A_log|_bias")
"""Matrices in blocks that no low-rank update is for: routers, gates of one output, convolutions, states, biases."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_works_from_wrapping_to_peft(family: str, tmp_path: Path):
    trial = trial_of(family, tmp_path)
    assert not trial.faults
    errors = {finding.part: finding.error for finding in trial.findings}
    assert [*errors] == ["training", "merge", "export", "adapter", "tokenizer"]
    assert 0 < errors["merge"] <= 1e-6  # zero would mean that nothing was trained
    assert errors["export"] == 0
    if family == "mamba":
        assert "incompatible with Mamba" in trial.findings[-2].said
    else:
        assert errors["adapter"] <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_wrapped_by_default(family: str):
    model = family_model(family)
    names = {name for name, _ in model.named_parameters()}
    wrapped = {name if name in names else f"{name}.weight" for name in check_targets(model, None, rank=2)}
    inside = {n for n, p in model.named_parameters() if re.search(r"\.\d+\.", n) and p.ndim > 1}
    assert wrapped and not {name for name in inside - wrapped if not _NO_LAYER.search(name)}
    assert wrapped <= inside
    assert not {name for name in wrapped if re.search(r"router|shared_expert_gate|mlp\.gate\.|embed|head", name)}


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_a_model_that_is_not_causal_is_refused_by_name(kind: str, tmp_path: Path):
    if kind == "bert":
        directory, said = saved(bert(is_decoder=False), tmp_path / "model"), "BertLMHeadModel look ahead"
    else:
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = BartForCausalLM(BartConfig(vocab_size=64, d_model=16, **sizes, **heads))
        directory, said = saved(model, tmp_path / "model"), "BartForConditionalGeneration .* would be loaded"
        config = json.loads((directory / "config.json").read_text())
        config["architectures"] = ["BartForConditionalGeneration"]
        (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnsuitableError, match=said):
        try_model(directory)


def test_a_layer_that_the_model_reads_past_is_refused_with_what_is_left(tmp_path: Path):
    directory = saved(family_model("mamba"), tmp_path / "model")
    with pytest.raises(
        UntrainedLayerError, match=rf"mixer\.dt_proj.* set relora\.target_modules to {', '.join(TARGETS['mamba'])}"
    ):
        try_model(directory, rank=2)


def test_attention_is_torchs_where_the_family_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from relora_train.training.models.pretrained import load_model, load_skeleton

    for family, kind in (("llama", "sdpa"), ("gemma2", "eager")):
        directory = saved(family_model(family), tmp_path / family)
        with caplog.at_level("INFO", logger="relora_train"):
            models = load_model(directory), load_skeleton(directory)
        assert [model.config._attn_implementation for model in models] == [kind, kind]
        assert ("Gemma2ForCausalLM attends by" in caplog.text) == (kind == "eager")


def test_a_subclass_that_computes_something_else_is_no_linear_layer():
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Alike(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + self.bias

    blocks = [nn.ModuleDict({"a": Doubling(4, 4), "b": Alike(4, 4), "c": nn.Linear(4, 1)}) for _ in range(2)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "heads": nn.ModuleList([nn.Linear(4, 4)])})
    before = torch.get_rng_state()
    assert check_targets(model, None, rank=1) == ["blocks.0.b", "blocks.1.b"]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command_prints_a_table_and_fails_by_name(tmp_path: Path, relora):
    directory = str(saved(family_model("gpt2"), tmp_path / "model"))
    done = relora("check", directory, "--rank", "2")
    assert done.code == 0
    for words in ("gpt2", "2 c_attn, 4 c_proj, 2 c_fc", "training   works", "merge      works", "export     works"):
        assert words in done.out
    record = json.loads(relora("check", directory, "--rank", "2", "--target", "c_fc", "--json").out)
    assert record["wrapped"] == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    assert "tokenizer  –" in done.out and "tokenizer.train = true" in " ".join(done.out.split())
    refused = relora("check", str(tmp_path / "nothing"))
    assert refused.code == 4 and "nothing" in refused.err


def test_the_command_says_no_more_than_its_table(tmp_path: Path):
    directory = saved(family_model("gpt2"), tmp_path / "model")
    train_tokenizer(["a text"], vocab_size=300).save(directory)
    done = subprocess.run(
        ["relora", "check", str(directory), "--rank", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4 and "tokenizer: 2" in done.stderr and "rows of the embedding" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1  # and not what peft and bitsandbytes tell on import


def test_a_model_without_safe_weights_is_refused_as_a_run_refuses_it(tmp_path: Path):
    directory = saved(family_model("llama"), tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="pickles can run code"):
        try_model(directory)
