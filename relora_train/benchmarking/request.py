"""What `relora bench` measures: shapes, arms and settings. Light."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from relora_train.config import FrozenConfig

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


SHAPES = {
    "9m": Shape(hidden_size=256, intermediate_size=688, layers=8, heads=4, vocab_size=4096, rank=16),
    "20m": Shape(hidden_size=512, intermediate_size=1376, layers=5, heads=8, vocab_size=4096, rank=32),
    "20m-32k": Shape(hidden_size=512, intermediate_size=1376, layers=1, heads=8, vocab_size=32000, rank=32),
    "35m": Shape(hidden_size=512, intermediate_size=1376, layers=8, heads=8, vocab_size=8192, rank=64),
    "llama_130m": Shape(
        hidden_size=768, intermediate_size=2048, layers=12, heads=12, vocab_size=32000, rank=128, sequences=32,
        sequence_length=512,
    ),
    "llama_350m": Shape(
        hidden_size=1024, intermediate_size=2736, layers=24, heads=16, vocab_size=32000, rank=128, sequences=32,
        sequence_length=512,
    ),
    "llama_1b": Shape(
        hidden_size=2048, intermediate_size=5461, layers=24, heads=32, vocab_size=32000, rank=128, sequences=32,
        sequence_length=512,
    ),
}  # fmt: skip
"""The first four are for a CPU, the others the paper's, for a GPU."""


class ArmRequest(FrozenConfig):
    """One process's work: an arm at a shape."""

    arm: Arm
    shape: Shape
    dropout: float = Field(0.1, ge=0, lt=1)
    """On the input of A."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """'bfloat16': peers hold everything in it, as the paper's code does; ours has its factors in float32."""

    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    compile: bool = False
