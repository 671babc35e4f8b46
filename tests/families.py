"""Tiny random models of many families, and what a trial finds of each: `python tests/families.py` prints the table."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from relora_train.training.model_trial import Trial, try_model

_IDS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_IDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_GPT2 = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BLOOM = {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "llama, tied": ("Llama", {**_GROUPED, "tie_word_embeddings": True, "attention_bias": True}),
    "gpt_neox": ("GPTNeoX", _LLAMA),
    "mistral": ("Mistral", _HEADS),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _HEADS),
    "gemma2": ("Gemma2", _HEADS),
    "gemma3_text": ("Gemma3Text", _HEADS),
    "phi": ("Phi", _LLAMA),
    "phi3": ("Phi3", _GROUPED),
    "opt": ("OPT", {**_LLAMA, "word_embed_proj_dim": 32, "ffn_dim": 48}),
    "stablelm": ("StableLm", _GROUPED),
    "olmo2": ("Olmo2", _GROUPED),
    "cohere": ("Cohere", _GROUPED),
    "granite": ("Granite", _GROUPED),
    "smollm3": ("SmolLM3", _GROUPED),
    "starcoder2": ("Starcoder2", _GROUPED),
    "lfm2": ("Lfm2", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_bigcode": ("GPTBigCode", _GPT2),
    "falcon": ("Falcon", _LLAMA),
    "bloom": ("Bloom", _BLOOM),
    "mpt": ("Mpt", {**_IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 8}),
    "codegen": ("CodeGen", {**_GPT2, "rotary_dim": 8}),
    "gpt_neo": (
        "GPTNeo",
        {
            **_IDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8, "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "mixtral": ("Mixtral", {**_HEADS, **_LOCAL_EXPERTS}),
    "qwen2_moe": ("Qwen2Moe", {**_GROUPED, **_EXPERTS, **_SHARED_EXPERT}),
    "qwen3_moe": ("Qwen3Moe", {**_HEADS, **_EXPERTS}),
    "qwen3_next": (
        "Qwen3Next",
        {
            **_HEADS, **_EXPERTS, **_SHARED_EXPERT, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOss", {**_HEADS, **_LOCAL_EXPERTS, "layer_types": ["sliding_attention", "full_attention"]}),
    "granitemoe": ("GraniteMoe", {**_GROUPED, **_LOCAL_EXPERTS}),
    "olmoe": ("Olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        },
    ),
    "mamba": ("Mamba", {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}  # fmt: skip
"""Class of the configuration and its values, by the name of the family. Mamba's own layers cannot all be wrapped."""

TARGETS = {"mamba": ("in_proj", "out_proj", "x_proj")}
"""relora.target_modules of those whose default is refused."""


def family_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a model of two blocks, its weights large enough for every layer to matter."""
    kind, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, "initializer_range": 0.1, **changes})
    return AutoModelForCausalLM.from_config(config)


def trial_of(family: str, directory: Path) -> Trial:
    """Return what `relora check` finds of a family."""
    family_model(family).save_pretrained(directory)
    return try_model(directory, rank=2, target_modules=TARGETS.get(family))


def main() -> None:
    sys.stdout.write("| family | layers | of all parameters | merge | export | adapter |\n|---|---|---|---|---|---|\n")
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            trial = trial_of(family, Path(directory))
        errors = [each.said if each.error is None else f"{each.error:.1e}" for each in trial.findings]
        share = f"{trial.kinds['wrapped'] / trial.parameters:.0%}"
        sys.stdout.write(f"| {' | '.join([family, str(len(trial.wrapped)), share, *errors[1:4]])} |\n")


if __name__ == "__main__":
    main()
