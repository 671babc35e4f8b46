"""The shape of any causal language model, read from config.json and the headers of its safetensors files.

This module imports no torch and reads no value of a tensor. Layers are counted as a mean over the blocks.
"""

import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from relora_train.training.models.shape import LinearShape, ModelShape, ShapeUnknownError

_INDEX = re.compile(r"\.\d+(?=\.|$)")
_TEXT_PART = re.compile(r"^(model\.)?language_model\.(model\.)?")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

_COMPARED = ("cohere", "gemma2", "granite", "llama", "mistral", "olmo2", "opt", "qwen2", "qwen3", "smollm3")
"""Families whose activations were counted to within a tenth: tests/test_shape_of_files.py."""

_BUFFER = "correction_bias"
"""End of the name of a router's tensor that files hold and no optimizer trains."""

Shapes = dict[str, tuple[int, ...]]


def shape_of_files(directory: Path, config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the model in a directory. ShapeUnknownError if it is not there, or is no stack of blocks."""
    config = {**config, **(config.get("text_config") or {})}
    tensors = _text_part({name: shape for name, shape in sorted(_headers(directory)) if not name.endswith(_BUFFER)})
    stacks: dict[str, Counter[str]] = defaultdict(Counter)
    sizes: Counter[str] = Counter()
    blocks: dict[str, set[str]] = defaultdict(set)
    for name, shape in tensors.items():
        if found := _INDEX.search(name):
            stack = name[: found.start()]
            stacks[stack][name] = prod(shape)
            sizes[stack] += prod(shape)
            blocks[stack].add(found[0])
    if not sizes:
        raise ShapeUnknownError(f"{directory} holds no repeated blocks")
    stack = max(sizes, key=sizes.__getitem__)
    outside = {name: shape for name, shape in tensors.items() if name not in stacks[stack]}
    inside = {name[len(stack) :]: shape for name, shape in tensors.items() if name in stacks[stack]}
    layers = len(blocks[stack])
    experts = next((int(config[key]) for key in _EXPERTS if config.get(key)), 0)
    linears, rest = _linears(inside, layers, experts, int(config.get("num_experts_per_tok") or 1))
    vocabulary, hidden = max((s for s in outside.values() if len(s) == 2), default=(0, 0))
    tables = [shape for shape in outside.values() if shape == (vocabulary, hidden)]
    if not tables or not linears:
        raise ShapeUnknownError(f"{directory} holds no embedding or no linear layers in its blocks")
    vectors = sum(prod(shape) for shape in (*outside.values(), *rest.values()) if len(shape) < 2)
    matrices = sum(prod(shape) for shape in rest.values() if len(shape) > 1)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads") or 1)
    attention = heads * int(config.get("head_dim") or hidden // heads)
    gated = any("gate" in linear.name or linear.name.endswith((".w1", ".w3")) for linear in linears)
    rotates = any(key.startswith("rope") or key.startswith("rotary") for key, value in config.items() if value)
    key_value = attention * int(config.get("num_key_value_heads") or heads) // heads
    return ModelShape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        layers=layers,
        linears=linears,
        norm_parameters=vectors,
        attention_size=attention,
        tied=len(tables) == 1,
        family="llama" if gated else "gpt_neox" if rotates else "vit",
        other_matrices=sum(prod(shape) for shape in outside.values() if len(shape) > 1) - sum(map(prod, tables)),
        block_matrices=matrices,
        key_value_size=key_value,
        inner_size=_inner(linears, hidden),
        extra_norms=_extra_norms(rest, layers, hidden, attention, key_value),
        rough=config.get("model_type") not in _COMPARED,
        scores=0 if _attends_fused(str(config.get("model_type"))) else heads,
    )


def _headers(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of all tensors."""
    files = sorted(directory.expanduser().glob("model*.safetensors"))
    if not files:
        raise ShapeUnknownError(f"not known until {str(directory)!r} is downloaded")
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(size)) if size < path.stat().st_size else {}
            except ValueError:
                raise ShapeUnknownError(f"{path} is no safetensors file") from None
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, tuple(entry["shape"])


def _text_part(tensors: Shapes) -> Shapes:
    """Return the tensors of the part for text, if there are others beside it."""
    if not any(_TEXT_PART.match(name) for name in tensors):
        return tensors
    return {name: shape for name, shape in tensors.items() if _TEXT_PART.match(name) or name.startswith("lm_head")}


def _linears(inside: Shapes, layers: int, experts: int, used: int) -> tuple[tuple[LinearShape, ...], Shapes]:
    """Return the linear layers of a block, and what tensors of blocks are no part of one.

    inside: the tensors of all blocks by name from the block's number on. Experts lie one by one or in one tensor.
    """
    found: dict[tuple[str, int, int], list[str]] = {}
    biases: Shapes = {}
    rest = dict(inside)
    for name, shape in inside.items():
        plain = _INDEX.sub("", name).lstrip(".")
        end = plain.rpartition(".")[2]
        if len(shape) == 3 and "expert" in plain and shape[0] == experts:
            plain, shape = plain.removesuffix(".weight"), (shape[2], shape[1])
        elif len(shape) == 2 and end == "weight" and 1 not in shape and not (experts and experts in shape):
            plain = plain.removesuffix(".weight")
        else:
            if end == "bias" and len(shape) == 1:
                biases[plain.removesuffix(".bias")] = shape
            continue
        found.setdefault((plain, *shape), []).append(name)
        del rest[name]
    linears = []
    for (plain, rows, columns), names in found.items():
        bias = biases.get(plain)
        turned = bias == (columns,) and rows != columns  # GPT-2's weights are (in, out)
        count = len(names) * (inside[names[0]][0] if len(inside[names[0]]) == 3 else 1)
        copies = Fraction(count, layers)
        linears.append(
            LinearShape(
                plain,
                *((rows, columns) if turned else (columns, rows)),
                bias=bias is not None,
                copies=copies,
                used=Fraction(used, experts)
                if "expert" in plain and experts and "shared" not in plain
                else Fraction(1),
            )
        )
        if bias is not None:
            for name in [name for name in rest if _INDEX.sub("", name).lstrip(".") == f"{plain}.bias"]:
                del rest[name]
    return tuple(_as_held(linears)), rest


def _as_held(linears: list[LinearShape]) -> Iterator[LinearShape]:
    """Yield experts as transformers holds them: gate and up, which files may hold apart, are one matrix."""
    for linear in linears:
        parent, _, own = linear.name.rpartition(".")
        if linear.is_expert and own in ("gate_proj", "w1"):
            yield replace(linear, name=f"{parent}.gate_up_proj", out_features=2 * linear.out_features)
        elif not (linear.is_expert and own in ("up_proj", "w3")):
            yield replace(linear, name=f"{parent}.down_proj") if linear.is_expert and own == "w2" else linear


def _extra_norms(vectors: Shapes, layers: int, hidden: int, queries: int, keys: int) -> int:
    """Return the widths, together, of a block's norms beyond two: after its parts, of queries and of keys."""
    names = Counter(_INDEX.sub("", name) for name in vectors if name.endswith(".weight"))
    of_heads = sum(queries if "q_" in name else keys for name in names if re.search(r"(q|k)_\w*norm", name))
    wide = sum(count for name, count in names.items() if not re.search(r"(q|k)_\w*norm", name))
    return of_heads + hidden * max(0, round(wide / layers) - 2)


def _attends_fused(model_type: str) -> bool:
    """Return True unless transformers' code, which is read and not run, has no fused attention for this type."""
    found = importlib.util.find_spec("transformers")
    for root in (found.submodule_search_locations or ()) if found else ():
        folder = Path(root) / "models" / model_type.removesuffix("_text")
        code = folder / f"modeling_{folder.name}.py"
        return not code.is_file() or "_supports_sdpa = True" in code.read_text(encoding="utf-8")
    return True


def _inner(linears: tuple[LinearShape, ...], hidden: int) -> int:
    """Return the width inside the MLP that a token passes, experts together."""
    down = [linear for linear in linears if linear.out_features == hidden and "attn" not in linear.name]
    down = [linear for linear in down if "attention" not in linear.name] or list(linears)
    return round(sum(linear.in_features * linear.copies * linear.used for linear in down))
