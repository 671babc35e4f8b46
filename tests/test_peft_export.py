"""An exported adapter is right on the model its stage began from, in peft's own hands."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from stage_runs import tiny_profile
from stored_runs import Workshop
from tiny_data import VOCABULARY
from tiny_models import relative_error, token_batch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.cli.export import export_adapter
from relora_train.errors import CheckpointNotFoundError, ConfigError
from relora_train.runs.retry import differing_files, retry_stage
from relora_train.runs.run import fetch_parent
from relora_train.training.peft_export import adapter_on_base

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, list[str] | None]] = {
    "llama": (LlamaConfig(**SHAPE), None),
    "llama, tied": (LlamaConfig(**SHAPE, tie_word_embeddings=True), None),
    "llama, biases": (LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True), ["q_proj", "up_proj"]),
    "gpt-neox": (GPTNeoXConfig(**SHAPE), None),
    "gpt-neox, tied": (GPTNeoXConfig(**SHAPE, tie_word_embeddings=True), None),
    "experts": (
        Qwen3MoeConfig(
            **SHAPE, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16, mlp_only_layers=[0],
        ),
        ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    ),
}  # fmt: skip


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path / "store", patch)


@pytest.fixture
def train(workshop: Workshop, tmp_path: Path) -> Callable[..., list[CheckpointRef]]:
    """Train a family's model a little: its line of checkpoints."""

    def trained(family: str = "llama", *, warm_start_steps: int = 2, **sections: Any) -> list[CheckpointRef]:
        config, targets = FAMILIES[family]
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        relora = {"target_modules": targets, "alpha": 8, **sections.pop("relora", {})}
        schedule = {"warm_start_steps": warm_start_steps, "cycles": 2, "cycle_length": 3, "warmup_steps": 1}
        profile = tiny_profile(
            model={"pretrained": str(tmp_path / "model")},
            batch={"sequence_length": 16},
            schedule={**schedule, "restart_warmup_steps": 1},
            optimizer={"learning_rate": 3e-2},
            relora=relora,
            **sections,
        )
        return workshop.train(profile)

    return trained


def load(directory: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=token_batch(seed=5) % VOCABULARY).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_parent_and_adapter_give_the_checkpoints_logits(family, train, tmp_path):
    line = train(family)
    for parent, checkpoint in ((line[0], line[1]), (line[1], line[2])):
        out = tmp_path / checkpoint.manifest.stage
        export_adapter(checkpoint, out)
        expected = logits(load(fetch_parent(checkpoint)))
        adapted = PeftModel.from_pretrained(load(fetch_parent(parent)), out)
        assert relative_error(logits(adapted), expected) < 1e-5  # float32: W is rounded once more by the merge
        assert relative_error(logits(load(fetch_parent(parent))), expected) > 1e-2
        assert relative_error(logits(adapted.merge_and_unload()), expected) < 1e-5
    names = set(load_file(out / "adapter_model.safetensors"))
    assert any(".lora_A." in name for name in names)
    assert not any("expert" in name and ".lora_" in name for name in names)


def test_an_adapter_on_a_pretrained_model_needs_no_warm_start(train, tmp_path):
    checkpoint = train("gpt-neox", warm_start_steps=0)[0]
    assert checkpoint.manifest.parent is None
    written, parent = export_adapter(checkpoint, tmp_path / "out")
    assert parent is None and json.loads((written.directory / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(tmp_path / "model")
    adapted = PeftModel.from_pretrained(load(tmp_path / "model"), written.directory)
    assert relative_error(logits(adapted), logits(load(fetch_parent(checkpoint)))) < 1e-5


def test_only_what_was_trained_is_saved_beside_the_low_rank_updates(train, tmp_path):
    export_adapter(train("llama, biases")[1], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "up_proj"}
    assert config["bias"] == "lora_only"
    saved = {name.rpartition(".")[2] for name in config["modules_to_save"]}
    others = {"k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}  # not targeted, hence trained in full
    norms = {"norm", "input_layernorm", "post_attention_layernorm"}
    assert saved == {"embed_tokens", "lm_head", *others, *norms}


def test_the_scaling_is_the_stages(train, tmp_path):
    line = train(warm_start_steps=8, relora={"rank_stabilized": True, "rank": 8})
    export_adapter(line[2], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_rslora"]
    adapted = PeftModel.from_pretrained(load(fetch_parent(line[1])), tmp_path / "out")
    assert relative_error(logits(adapted), logits(load(fetch_parent(line[2])))) < 1e-5


def test_the_command_writes_names_and_keeps_both_checkpoints(train, tmp_path, relora, monkeypatch):
    _, parent, checkpoint = train()
    monkeypatch.setenv("RELORA_STORE", str(tmp_path / "store"))
    out = tmp_path / "out"
    done = relora("export", "tiny@cycle-2", str(out), "--as-adapter")
    assert done.code == 0 and f'PeftModel.from_pretrained(model, "{out}"), model being {parent.uri}' in done.out
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(fetch_parent(parent))
    assert checkpoint.uri in (out / "README.md").read_text()
    assert {path.name for path in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    for name, place, more, words in (
        ("cycle-2", out, [], "is not empty"),
        ("cycle-2", out, ["--force"], "writes float32 to a new directory"),
        ("warm-start", tmp_path / "no", [], "full-rank stage warm-start, which has no low-rank update"),
    ):
        refused = relora("export", f"tiny@{name}", str(place), "--as-adapter", *more)
        assert refused.code == 2 and words in refused.err
    kept = json.loads(relora("prune", "tiny", "--keep-last", "1", "--dry-run", "--json").out)["checkpoints"]
    reasons = {one["uri"]: one["reasons"] for one in kept}
    assert "exported" in reasons[parent.uri] and "exported" in reasons[checkpoint.uri]
    assert not (tmp_path / "no").exists()


def test_what_has_no_base_is_refused_with_its_reason(train, workshop, tmp_path):
    line = train()
    (fetch_parent(line[1]) / "manifest.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"{line[1].uri}, which is not there any more \(pruned"):
        export_adapter(line[2], tmp_path / "out")
    scratch = workshop.train(tiny_profile(schedule={"warm_start_steps": 0, "cycles": 1}), "scratch")[0]
    with pytest.raises(ConfigError, match="has no parent checkpoint: it began from random weights"):
        export_adapter(scratch, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_changed_otherwise_is_saved_whole(train):
    line = train()
    model, base = (load(fetch_parent(ref)) for ref in (line[1], line[0]))
    adapter = fetch_parent(line[1]) / "adapter"
    updates = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    tensors, changes = adapter_on_base(model, base, updates, config)
    name = "model.layers.0.self_attn.q_proj"
    assert name in changes["modules_to_save"] and name not in changes["target_modules"]
    assert f"base_model.model.{name}.weight" in tensors and f"base_model.model.{name}.lora_A.weight" not in tensors


def test_a_checkpoints_own_adapter_names_its_parent_and_says_what_it_is_not(train, workshop, monkeypatch):
    line = train()
    for parent, checkpoint in ((line[0], line[1]), (line[1], line[2])):
        adapter = fetch_parent(checkpoint) / "adapter"
        named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == parent.prefix.rpartition("/")[2]
        readme = (adapter / "README.md").read_text()
        assert "Do not load" in readme and "--as-adapter" in readme
    before = [entry for entry in line[2].manifest.files if entry.path != "adapter/README.md"]
    older = line[2].manifest.model_copy(update={"files": tuple(before)})
    assert differing_files(line[2].manifest, older) == ()  # of a version that wrote none
    assert retry_stage(line[2], on_event=lambda event: None).identical
