"""The parts of a model, counted from its shape alone."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from relora_train.errors import ConfigError, NoTargetModulesError


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of the blocks."""

    name: str
    """Its name inside the block, such as 'self_attn.q_proj'."""

    in_features: int
    out_features: int
    bias: bool = False
    copies: Fraction = Fraction(1)
    """Layers like this in a block, on average: its experts, or less than one if only some blocks have it."""

    used: Fraction = Fraction(1)
    """The share of them that a token passes."""

    @property
    def weights(self) -> int:
        """Parameters of a block's copies."""
        return round(self.in_features * self.out_features * self.copies)

    @property
    def sides(self) -> int:
        """in + out: parameters of A and B at rank 1, of a block's copies."""
        return round((self.in_features + self.out_features) * self.copies)

    @property
    def biases(self) -> int:
        """Parameters of a block's biases."""
        return round(self.out_features * self.copies) if self.bias else 0

    @property
    def is_expert(self) -> bool:
        """True for one of the experts that a module holds as one parameter."""
        return self.copies > 1 and "expert" in self.name and "shared" not in self.name

    @property
    def passed(self) -> int:
        """Weights that multiply a token."""
        return round(self.weights * self.used)


@dataclass(frozen=True)
class ModelShape:
    """A transformer: embedding, equal blocks of linear layers and norms, head."""

    vocab_size: int
    """Rows of the embedding and of the head; of a model without an embedding of tokens, of the head."""

    hidden_size: int
    layers: int
    """Blocks."""

    linears: tuple[LinearShape, ...]
    """The linear layers of one block."""

    norm_parameters: int
    """Parameters of all norms together."""

    attention_size: int
    """Width of all query heads together."""

    tied: bool
    """True if embedding and head are one matrix, or there is no embedding."""

    family: str
    """The model_type of transformers."""

    causal: bool = True
    """True if half of the attention is masked."""

    extra_rows: int = 0
    """Positions of a sequence that are no tokens, such as a class token."""

    classifies: bool = False
    """True if the head reads one position of a sequence instead of all."""

    other_matrices: int = 0
    """Parameters outside blocks, embedding and head that are no vectors: patch projection, positions."""

    other_vectors: int = 0
    """Biases outside blocks."""

    block_matrices: int = 0
    """Parameters inside blocks that are no vectors and in no linear layer that can be wrapped, such as routers."""

    key_value_size: int | None = None
    """Width of all key heads together; as that of queries when absent."""

    inner_size: int | None = None
    """Width inside the MLP; the input of a block's last linear layer when absent."""

    extra_norms: int = 0
    """Norms of a block beyond two, in widths of the hidden size; those of queries and keys count by their widths."""

    scores: int = 0
    """Heads whose scores are kept: transformers attends by plain code."""

    rough: bool = False
    """True if activations of this family were never compared with a real step's."""

    input_flops: int = 0
    """Forward and backward of whatever stands in an embedding's place, for one token."""

    @property
    def parameters(self) -> int:
        """The number of all parameters; a tied matrix counts once."""
        per_block = sum(linear.weights + linear.biases for linear in self.linears)
        matrices = 1 if self.tied else 2
        ends = matrices * self.vocab_size * self.hidden_size + self.other_matrices + self.other_vectors
        return ends + self.layers * per_block + self.norm_parameters + self.block_matrices

    @property
    def vector_parameters(self) -> int:
        """The number of those in norms and biases."""
        biases = self.layers * sum(linear.biases for linear in self.linears)
        return self.norm_parameters + biases + self.other_vectors

    def parameters_by_kind(self, wrapped: Sequence[LinearShape] = ()) -> dict[str, int]:
        """Return the parameters by the kinds of relora.train; the weights of the wrapped layers of a block are one."""
        linears, matrix = self.linears, self.vocab_size * self.hidden_size
        if self.classifies:  # the biases outside blocks are those of patches, or none, and of the head
            biases = min(self.vocab_size, self.other_vectors)
            head, embeddings = matrix + biases, self.other_matrices + self.other_vectors - biases
        else:
            embeddings, head = matrix + self.other_matrices + self.other_vectors, 0 if self.tied else matrix
        return {
            "wrapped": self.layers * sum(linear.weights for linear in wrapped),
            "embeddings": embeddings,
            "head": head,
            "norms": self.norm_parameters,
            "biases": self.layers * sum(linear.biases for linear in linears),
            "others": self.layers * sum(li.weights for li in linears if li not in wrapped) + self.block_matrices,
        }

    def rows(self, sequence_length: int) -> int:
        """Positions of a sequence of so many tokens in the blocks."""
        return sequence_length + self.extra_rows


class ShapeUnknownError(Exception):
    """The shape is not on this machine; the text says why. Not for users: plan() states it and goes on."""


def wrapped_layers(
    shape: ModelShape, *, target_modules: tuple[str, ...] | None, rank: int, setting: str = "relora.rank"
) -> tuple[LinearShape, ...]:
    """Return the layers of a block that get a low-rank update: those named by their ends, whole segments; None: all.

    Raises NoTargetModulesError for a name without a layer, ConfigError where the rank, which `setting` names, exceeds a
    side of a layer, and ShapeUnknownError for names of single blocks.
    """
    names = tuple(linear.name for linear in shape.linears)
    suffixes = names if target_modules is None else target_modules
    unmatched = [suffix for suffix in suffixes if not any(f".{name}".endswith(f".{suffix}") for name in names)]
    if beyond := [suffix for suffix in unmatched if suffix.endswith(tuple(f".{name}" for name in names))]:
        raise ShapeUnknownError(f"relora.target_modules picks blocks ({beyond[0]!r}), and all blocks are counted alike")
    if unmatched or not suffixes:
        raise NoTargetModulesError(
            f"relora.target_modules names {', '.join(map(repr, unmatched)) or 'nothing'}, and no linear layer of a "
            f"block is called so (embeddings and head are trained in full). A block has {', '.join(names)}: set "
            "relora.target_modules to ends of some of these."
        )
    wrapped = tuple(li for li in shape.linears if any(f".{li.name}".endswith(f".{suffix}") for suffix in suffixes))
    for linear in wrapped:
        if rank > min(linear.in_features, linear.out_features):
            raise ConfigError(
                f"{setting} {rank} exceeds the smaller side of {linear.name} ({linear.in_features} -> "
                f"{linear.out_features}). Lower {setting}"
                f"{', or leave the layer out of relora.target_modules' if setting == 'relora.rank' else ''}."
            )
    return wrapped


def model_flops_per_token(
    shape: ModelShape,
    *,
    sequence_length: int,
    wrapped: Mapping[tuple[LinearShape, ...], float] | None = None,
    frozen: Collection[str] = (),
) -> int:
    """Return the FLOPs of forward and backward for one token: 6 for each weight at full rank, and attention.

    wrapped: FLOPs a position of the wrapped layers of a block, whose weights are frozen beside A and B, by the layers
    that are computed together. frozen: kinds of relora.train, whose weights get no gradient. Not counted: the merges.
    """
    wrapped = wrapped or {}
    low_rank = {linear for layers in wrapped for linear in layers}
    each = 4 if "others" in frozen else 6
    linears = sum(wrapped.values()) + sum(each * linear.passed for linear in shape.linears if linear not in low_rank)
    rows = shape.rows(sequence_length)
    attention = (6 if shape.causal else 12) * shape.attention_size * rows  # scores, their product with the values
    blocks = shape.layers * (linears + attention) * rows / sequence_length
    matrix = "embeddings" if shape.tied and not shape.classifies else "head"
    head = (4 if matrix in frozen else 6) * shape.vocab_size * shape.hidden_size
    return round(blocks + (head / sequence_length if shape.classifies else head) + shape.input_flops)


def read_json(path: Path, until: str) -> dict[str, Any]:
    """Return a JSON object from a local file; ShapeUnknownError, with the event to wait for, if there is none."""
    if not path.is_file():
        raise ShapeUnknownError(f"not known until {until}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShapeUnknownError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ShapeUnknownError(f"{path} is not a JSON object")
    return content
