"""The shape of a model, read from its config.json: of the families that are counted exactly."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from relora_train.training.models.shape import LinearShape, ModelShape, ShapeUnknownError


def shape_of_config(config: Mapping[str, Any], path: Path | str) -> ModelShape:
    """Return the shape that a config.json describes; ShapeUnknownError for a family that is not counted."""
    family = config.get("model_type")
    readers = {
        "llama": _llama_of_config,
        "gpt_neox": _neox_of_config,
        "vit": _vit_of_config,
        "bert": _bert_of_config,
        "t5": _t5_of_config,
    }
    if family not in readers:
        raise ShapeUnknownError(f"models of type {family!r} are not counted, only {', '.join(readers)}")
    try:
        return readers[family](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ShapeUnknownError(f"{path} lacks a usable shape ({type(error).__name__}: {error})") from None


def _llama_of_config(config: Mapping[str, Any]) -> ModelShape:
    hidden, intermediate, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, bias = config["num_attention_heads"], config.get("attention_bias", False)
    head_size, mlp_bias = config.get("head_dim") or hidden // heads, config.get("mlp_bias", False)
    attention, key_value = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
    linears = (
        LinearShape("self_attn.q_proj", hidden, attention, bias),
        LinearShape("self_attn.k_proj", hidden, key_value, bias),
        LinearShape("self_attn.v_proj", hidden, key_value, bias),
        LinearShape("self_attn.o_proj", attention, hidden, bias),
        LinearShape("mlp.gate_proj", hidden, intermediate, mlp_bias),
        LinearShape("mlp.up_proj", hidden, intermediate, mlp_bias),
        LinearShape("mlp.down_proj", intermediate, hidden, mlp_bias),
    )
    norms = (2 * layers + 1) * hidden  # RMSNorm has no bias
    tied = config.get("tie_word_embeddings", False)
    return ModelShape(config["vocab_size"], hidden, layers, linears, norms, attention, tied, "llama")


def _neox_of_config(config: Mapping[str, Any]) -> ModelShape:
    hidden, intermediate, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    bias = config.get("attention_bias", True)
    linears = (
        LinearShape("attention.query_key_value", hidden, 3 * hidden, bias),
        LinearShape("attention.dense", hidden, hidden, bias),
        LinearShape("mlp.dense_h_to_4h", hidden, intermediate, True),
        LinearShape("mlp.dense_4h_to_h", intermediate, hidden, True),
    )
    norms = (2 * layers + 1) * 2 * hidden  # LayerNorm has a bias
    tied = config.get("tie_word_embeddings", False)
    return ModelShape(config["vocab_size"], hidden, layers, linears, norms, hidden, tied, "gpt_neox")


def _vit_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Return a vision transformer that classifies by its class token."""
    hidden, intermediate, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    patch_values = config["num_channels"] * config["patch_size"] ** 2
    patches = (config["image_size"] // config["patch_size"]) ** 2
    classes = len(config["id2label"]) if "id2label" in config else 2  # transformers leaves its default of 2 out
    bias = config.get("qkv_bias", True)
    linears = (
        *(LinearShape(f"attention.{name}_proj", hidden, hidden, bias) for name in "qkv"),
        LinearShape("attention.o_proj", hidden, hidden, True),
        LinearShape("mlp.fc1", hidden, intermediate, True),
        LinearShape("mlp.fc2", intermediate, hidden, True),
    )
    return ModelShape(
        vocab_size=classes,
        hidden_size=hidden,
        layers=layers,
        linears=linears,
        norm_parameters=(2 * layers + 1) * 2 * hidden,  # LayerNorm has a bias
        attention_size=hidden,
        tied=True,
        family="vit",
        causal=False,
        extra_rows=1,
        classifies=True,
        other_matrices=patch_values * hidden + (patches + 2) * hidden,  # positions, also the class token's, and it
        other_vectors=hidden + classes,
        input_flops=4 * patch_values * hidden,  # nothing asks for the gradient of pixels
    )


def _bert_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Return a BERT with the head for hidden tokens: one matrix more, and the embedding's own."""
    hidden, intermediate, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    vocabulary, types = config["vocab_size"], config.get("type_vocab_size", 2)
    linears = (
        *(LinearShape(f"attention.self.{name}", hidden, hidden, True) for name in ("query", "key", "value")),
        LinearShape("attention.output.dense", hidden, hidden, True),
        LinearShape("intermediate.dense", hidden, intermediate, True),
        LinearShape("output.dense", intermediate, hidden, True),
    )
    return ModelShape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        layers=layers,
        linears=linears,
        norm_parameters=(2 * layers + 2) * 2 * hidden,  # LayerNorm has a bias
        attention_size=hidden,
        tied=config.get("tie_word_embeddings", True),
        family="vit",  # its blocks compute as a vision transformer's do
        causal=False,
        other_matrices=(config["max_position_embeddings"] + types + hidden) * hidden,
        other_vectors=hidden + vocabulary,
        rough=True,
    )


def _t5_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Return a T5: the blocks of encoder and decoder counted as one stack, of which a token passes its half.

    A batch is counted by the encoder's tokens, so the work is right where targets are as long as sources.
    """
    hidden, inner, size = config["d_model"], config["d_ff"], config["d_kv"] * config["num_heads"]
    encoder = config["num_layers"]
    decoder = config.get("num_decoder_layers") or encoder
    layers, vocabulary = encoder + decoder, config["vocab_size"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    linears = [
        LinearShape(f"{name}.{own}", *((size, hidden) if own == "o" else (hidden, size)), copies=copies)
        for name, copies in (("SelfAttention", Fraction(1)), ("EncDecAttention", Fraction(decoder, layers)))
        for own in "qkvo"
    ]
    first = ("wi_0", "wi_1") if gated else ("wi",)
    linears += [LinearShape(f"DenseReluDense.{name}", hidden, inner) for name in first]
    return ModelShape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        layers=layers,
        linears=(*linears, LinearShape("DenseReluDense.wo", inner, hidden)),
        norm_parameters=(2 * encoder + 3 * decoder + 2) * hidden,
        attention_size=size,
        tied=config.get("tie_word_embeddings", True),
        family="llama" if gated else "gpt_neox",
        other_matrices=2 * config.get("relative_attention_num_buckets", 32) * config["num_heads"],
        rough=True,
    )
