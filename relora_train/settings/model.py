"""Settings of the model."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from relora_train.settings.base import Address, FrozenConfig


class ModelConfig(FrozenConfig):
    """The model: a Llama of this shape, or one to continue from."""

    pretrained: Address | None = None
    """Local directory or hub id to continue from; the shape below is then ignored."""

    revision: str | None = None
    """Hub revision of `pretrained`."""

    hidden_size: int = Field(256, ge=8)
    """Width of the residual stream."""

    intermediate_size: int = Field(688, ge=8)
    """Width inside the MLP."""

    num_hidden_layers: int = Field(4, ge=1)
    """Number of transformer blocks."""

    num_attention_heads: int = Field(4, ge=1)
    """Attention heads; must divide hidden_size."""

    num_key_value_heads: int | None = Field(None, ge=1)
    """Heads of keys and values; as many as attention heads when absent."""

    vocab_size: int | None = Field(None, ge=2)
    """Rows of the embedding; the tokenizer's size when absent, never less than it."""

    max_position_embeddings: int = Field(1024, ge=8)
    """Longest sequence the model is made for."""

    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""

    rms_norm_eps: float = Field(1e-6, gt=0)
    """Added to the variance in RMSNorm."""

    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary position embedding."""

    tie_word_embeddings: bool = False
    """Share one matrix between embedding and head."""

    @model_validator(mode="after")
    def heads_divide_the_width_evenly(self) -> Self:
        if self.pretrained is not None:
            return self
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} in {self.num_attention_heads} heads makes heads of {self.head_size}; "
                "rotary positions need an even number"
            )
        kv_heads = self.num_key_value_heads
        if kv_heads and self.num_attention_heads % kv_heads:
            raise ValueError(f"{self.num_attention_heads} attention heads are not a multiple of {kv_heads} kv heads")
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_size(self) -> int:
        """Width of keys and values."""
        return self.head_size * (self.num_key_value_heads or self.num_attention_heads)
