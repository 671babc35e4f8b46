"""What `relora bench` measures: shapes, arms and settings. Light."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from relora_train.errors import ConfigError
from relora_train.settings.base import FrozenConfig

Arm = Literal["full", "paper", "peft", "ours-full", "ours"]
"""'full': eager transformers, torch's default AdamW, all logits. 'paper': ReLoRA as the paper's code writes it, on the
same model and optimizer. 'peft': LoRA of the peft library, likewise. 'ours-full', 'ours': this library's own step."""

ARMS: tuple[Arm, ...] = ("full", "paper", "peft", "ours-full", "ours")


class Shape(FrozenConfig):
    """A Llama, and how much it reads at once."""

    hidden_size: int = Field(ge=8)
    intermediate_size: int = Field(ge=8)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    vocab_size: int = Field(ge=16)
    rank: int = Field(ge=1)
    sequences: int = Field(8, ge=1)
    """In one forward pass; an update is one forward pass."""

    sequence_length: int = Field(256, ge=8)

    @property
    def tokens(self) -> int:
        """Tokens of an update."""
        return self.sequences * self.sequence_length


_PAPERS = {
    "130m": Shape(
        hidden_size=768, intermediate_size=2048, layers=12, heads=12, vocab_size=32000, rank=128, sequences=32,
        sequence_length=512,
    ),
    "350m": Shape(
        hidden_size=1024, intermediate_size=2736, layers=24, heads=16, vocab_size=32000, rank=128, sequences=32,
        sequence_length=512,
    ),
    "1b": Shape(
        hidden_size=2048, intermediate_size=5461, layers=24, heads=32, vocab_size=32000, rank=128, sequences=32,
        sequence_length=512,
    ),
}  # fmt: skip


def _two_layers(shape: Shape, *, sequences: int) -> Shape:
    """With two layers' share of the vocabulary: a layer, attention and head take the shares that they have in all."""
    vocab_size = round(2 * shape.vocab_size / shape.layers)
    return shape.model_copy(update={"layers": 2, "vocab_size": vocab_size, "sequences": sequences})


SHAPES = {
    "9m": Shape(hidden_size=256, intermediate_size=688, layers=8, heads=4, vocab_size=4096, rank=16),
    "20m": Shape(hidden_size=512, intermediate_size=1376, layers=5, heads=8, vocab_size=4096, rank=32),
    "20m-32k": Shape(hidden_size=512, intermediate_size=1376, layers=1, heads=8, vocab_size=32000, rank=32),
    "35m": Shape(hidden_size=512, intermediate_size=1376, layers=8, heads=8, vocab_size=8192, rank=64),
    "130m": _two_layers(_PAPERS["130m"], sequences=4),
    "350m": _two_layers(_PAPERS["350m"], sequences=4),
    "1b": _two_layers(_PAPERS["1b"], sequences=2),
    **{f"llama_{name}": shape for name, shape in _PAPERS.items()},
}
"""The first four are for a CPU, the last three the paper's, for a GPU. 130m, 350m and 1b are two layers of these."""


def find_shape(name: str) -> Shape:
    """One of SHAPES. Raises ConfigError for an unknown name."""
    if name not in SHAPES:
        raise ConfigError(f"There is no shape {name!r} to measure. Choose from: {', '.join(SHAPES)}.")
    return SHAPES[name]


FEW_ARMS: dict[str, tuple[str, ...]] = {
    "20m-32k": ("paper", "ours"),
    "130m": ("paper", "ours-full", "ours", "ours p=0"),
    "350m": ("paper", "ours-full", "ours", "ours p=0"),
    "1b": ("ours-full", "ours", "ours p=0"),
}
"""Shapes that answer one question each, memory or the share of the FLOP bound, and the arms that it needs."""


class ArmRequest(FrozenConfig):
    """One process's work: an arm at a shape."""

    arm: Arm
    shape: Shape
    dropout: float = Field(0.1, ge=0, lt=1)
    """On the input of A."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """'bfloat16': peers hold everything in it, as the paper's code does; ours has its factors in float32."""

    matmul_precision: Literal["auto", "highest", "high", "medium"] = "highest"
    """'auto': the fastest that has float32's accuracy, measured on the model's own products."""

    as_with_dropout: bool = False
    """Of 'ours': the order of products that dropout would leave, also without dropout."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    compile: bool = False
