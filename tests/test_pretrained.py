"""Only a model that is all there, and made for what it is trained on, is ever trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_runs import ignore, stage_request, tiny_profile
from tiny_models import VOCABULARY, tiny_gpt_neox, tiny_llama
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from relora_train.errors import ModelNotFoundError, ModelUnsuitableError
from relora_train.settings.profile import Profile
from relora_train.training.models.kinds import IMAGE_CLASSIFIER
from relora_train.training.models.model import check_causal, logits
from relora_train.training.models.pretrained import load_model, load_skeleton
from relora_train.training.models.registry import facts_of
from relora_train.training.sharding import rows_of_checkpoint
from relora_train.training.trainer import run_stage


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def without_a_weight(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def without_the_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def with_a_narrower_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(16, 32)


def with_one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)


FAULTS = [
    (without_a_weight, r"they lack model\.layers\.1\.mlp\.up_proj\.weight\. Nothing is made up"),
    (without_the_head, r"they lack lm_head\.weight.*tie_word_embeddings"),
    (with_a_narrower_weight, r"hold in another shape model\.layers\.0\.self_attn\.q_proj\.weight"),
    (with_one_more, r"hold beside it model\.layers\.2\.mlp\.up_proj\.weight"),
]


@pytest.mark.parametrize(("change", "said"), FAULTS)
def test_a_tensor_that_is_missing_misshapen_or_too_much_is_named(change: Any, said: str, tmp_path: Path):
    directory = saved(tiny_llama(), tmp_path)
    edit_tensors(directory, change)
    with pytest.raises(ModelUnsuitableError, match=said) as error:
        load_model(directory)
    assert str(directory) in str(error.value) and not error.value.retryable
    with pytest.raises(ModelUnsuitableError, match=said):  # as a rank of a sharded training reads it
        rows_of_checkpoint(directory, load_skeleton(directory))


def test_many_missing_tensors_are_counted(tmp_path: Path):
    directory = saved(tiny_llama(), tmp_path)
    edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in [*tensors] if "mlp" in name] and None)
    with pytest.raises(ModelUnsuitableError, match=r"down_proj\.weight, .* and 3 more"):
        load_model(directory)


def test_a_tied_head_is_not_missing_and_a_tied_file_whose_flag_is_off_is_refused(tmp_path: Path):
    directory = saved(tiny_llama(tie_word_embeddings=True), tmp_path)
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    model = load_model(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rows_of_checkpoint(directory, load_skeleton(directory))
    edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(ModelUnsuitableError, match=r"lack lm_head\.weight"):
        load_model(directory)
    with pytest.raises(ModelUnsuitableError, match=r"lack lm_head\.weight"):
        rows_of_checkpoint(directory, load_skeleton(directory))


def test_two_matrices_where_a_sharded_model_has_one_are_refused(tmp_path: Path):
    """transformers then trains both; a rank that reads rows would take the one for the other."""
    directory = saved(tiny_llama(), tmp_path)
    edit_config(directory, tie_word_embeddings=True)
    with pytest.raises(ModelUnsuitableError, match=r"hold beside it (lm_head|model\.embed_tokens)\.weight"):
        rows_of_checkpoint(directory, load_skeleton(directory))


def test_what_old_files_hold_beside_the_weights_is_no_fault(tmp_path: Path):
    directory = saved(tiny_gpt_neox(), tmp_path)
    stems = ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias", "gpt_neox.rope.inv_freq")
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.zeros(4) for name in stems}))
    assert load_model(directory) is not None


QUANTISED = [
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    {"compression_config": {"quant_method": "compressed-tensors"}},
]


def causal(directory: Path) -> Profile:
    return tiny_profile(model={"pretrained": str(directory)})


@pytest.mark.parametrize("changes", QUANTISED)
def test_quantised_weights_are_refused_before_any_is_read(changes: dict[str, Any], tmp_path: Path):
    directory = saved(tiny_llama(), tmp_path)
    edit_config(directory, **changes)
    (directory / "model.safetensors").unlink()  # so it is config.json alone that tells
    for look in (load_model, load_skeleton, lambda path: facts_of(causal(path)).check_pretrained()):
        with pytest.raises(ModelUnsuitableError, match=r"quantised.*Give the model's unquantised weights"):
            look(directory)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "has no config.json"),
        ("{", r"config\.json is not JSON: Expecting property name"),
        ("[]", "without vocab_size"),
        ('{"vocab_size": "many"}', "without vocab_size"),
        ('{"vocab_size": 4096}', "no weights in safetensors"),
    ],
)
def test_a_directory_that_holds_no_model_is_refused_for_its_own_reason(config: str | None, said: str, tmp_path: Path):
    (tmp_path / "pytorch_model.bin").touch()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelNotFoundError, match=said):
        facts_of(causal(tmp_path)).check_pretrained()


def test_a_file_in_the_place_of_a_model_is_refused_as_one_and_not_for_its_tokenizer(tmp_path: Path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json, so it is no model"):
        facts_of(causal(tmp_path / "model.gguf")).check_pretrained()


def test_a_model_with_a_value_that_is_not_finite_is_refused_by_the_tensors_name(tmp_path: Path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelUnsuitableError, match=r"Not every value is finite in model\.layers\.0\.mlp\.up_proj"):
        load_model(saved(model, tmp_path))


def classifier() -> PreTrainedModel:
    return LlamaForSequenceClassification(tiny_llama().config)


def bart() -> PreTrainedModel:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=VOCABULARY, **sizes)
    return BartForConditionalGeneration(config)


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=64))


@pytest.mark.parametrize(
    ("build", "name"),
    [(classifier, "LlamaForSequenceClassification"), (bart, "BartForConditionalGeneration"), (t5, "T5For")],
)
def test_a_model_made_for_another_task_is_refused_by_its_name(build: Any, name: str, tmp_path: Path):
    directory = saved(build(), tmp_path)
    for look in (load_model, load_skeleton, lambda path: facts_of(causal(path)).check_pretrained()):
        with pytest.raises(ModelUnsuitableError, match=rf"is a {name}.*a part of it would be lost"):
            look(directory)
    with pytest.raises(ModelUnsuitableError, match=f"is a {name}"):
        load_model(directory, kind=IMAGE_CLASSIFIER)


@pytest.mark.parametrize(("build", "name"), [(classifier, r"hold beside it score\.weight"), (bart, "hold beside it")])
def test_nor_does_it_pass_where_its_config_does_not_say_what_it_is(build: Any, name: str, tmp_path: Path):
    directory = saved(build(), tmp_path)
    edit_config(directory, architectures=None)
    with pytest.raises(ModelUnsuitableError, match=name):
        load_model(directory)


def test_a_body_without_a_head_is_refused_for_what_it_lacks(tmp_path: Path):
    body = LlamaModel(tiny_llama().config)
    with pytest.raises(ModelUnsuitableError, match=r"lack lm_head\.weight"):
        load_model(saved(body, tmp_path / "text"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    body = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes), add_pooling_layer=False)
    with pytest.raises(ModelUnsuitableError, match=r"lack classifier\.bias, classifier\.weight"):
        load_model(saved(body, tmp_path / "images"), kind=IMAGE_CLASSIFIER)


def test_a_model_that_transformers_has_no_head_for_is_refused(tmp_path: Path):
    directory = saved(t5(), tmp_path)
    edit_config(directory, architectures=None)
    with pytest.raises(ModelUnsuitableError, match="of type 't5', of which transformers has no AutoModelForCausalLM"):
        load_skeleton(directory)


def bert(*, is_decoder: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertLMHeadModel(BertConfig(vocab_size=300, is_decoder=is_decoder, **sizes))


def test_a_model_that_looks_ahead_is_refused_also_untrained(dataset: Path, tmp_path: Path):
    """At a standard deviation of 0.02 other tokens move an encoder's logits by 2e-4 of the largest only."""
    directory = saved(bert(is_decoder=False), tmp_path / "bert")
    relora = {"target_modules": ("query", "key", "value")}
    profile = tiny_profile(model={"pretrained": str(directory)}, relora=relora, schedule={"warm_start_steps": 0})
    with pytest.raises(ModelUnsuitableError, match="BertLMHeadModel look ahead"):
        run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), ignore)
    assert not (tmp_path / "out").exists()
    check_causal(load_model(saved(bert(is_decoder=True), tmp_path / "decoder")))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt_neox, lambda: bert(is_decoder=True)])
def test_the_probe_sees_a_leak_of_a_single_position(build: Any):
    model = build().eval()
    check_causal(model)
    forward = model.forward

    def leaking(input_ids: torch.Tensor, **options: Any) -> Any:
        output = forward(input_ids=input_ids, **options)
        output.logits[:, 3] += 1e-3 * output.logits[:, 4]  # the last position of the first half sees the next
        return output

    model.forward = leaking
    with pytest.raises(ModelUnsuitableError, match="look ahead"):
        check_causal(model)
    assert not logits(model, torch.zeros(1, 5, dtype=torch.long)).isnan().any()


def test_weights_that_are_not_finite_are_refused():
    model = tiny_llama()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ModelUnsuitableError, match="not finite"):
        check_causal(model)


def test_an_adapter_beside_the_weights_is_not_merged_by_the_way(tmp_path: Path):
    """With peft installed transformers would load it, and wrap the layers."""
    pytest.importorskip("peft")
    directory = saved(tiny_llama(), tmp_path)
    factors = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{stem}.{n}.weight": t for n, t in factors.items()}, directory / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(directory)}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ModelUnsuitableError, match="PEFT adapter"):
        load_model(directory)


def test_a_package_that_a_model_needs_and_that_is_missing_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoModelForCausalLM

    def refuses(*args: Any, **options: Any) -> None:
        raise ImportError("This modeling file requires the following packages: somewhere")

    directory = saved(tiny_llama(), tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuses)
    with pytest.raises(ModelNotFoundError, match="requires the following packages"):
        load_model(directory)
