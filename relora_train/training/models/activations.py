"""Memory of a micro-batch, counted from a model's shape: kept for the backward pass, and made on top of that.

The multiples below are what torch was seen to keep; tests/test_activations.py looks again.
"""

from collections.abc import Sequence
from typing import NamedTuple

from relora_train.method.products import sibling_groups
from relora_train.settings.profile import Profile
from relora_train.training.models.shape import LinearShape, ModelShape

EVALUATION_ROWS = 1024
"""Logits of so many tokens exist at once during evaluation."""

_LOGITS, _LOGITS_ON_GPU = 16_777_216, 134_217_728
"""Entries of one chunk's logits at most: 64 and 512 MB in float32, up to three times at once."""

_ROWS, _ROWS_ON_GPU = 512, 2048
"""But not fewer rows: below, products lose speed, and the head's gradient is gone over too often."""

_SIDE_ON_GPU = 64
"""A GPU multiplies 32,100 classes slower than 32,128: its tiles and its copies want sides that they divide."""

_FLOAT32, _BFLOAT16 = 4, 2


class _Kept(NamedTuple):
    """Tensors that a block keeps, by the width of a row: hidden size, attention, inside the MLP."""

    exact: int
    """Hidden size, in float32."""

    residual: int
    """Hidden size, in the dtype of the residual stream."""

    hidden: int
    """Hidden size, in the dtype of products, as are the next two."""

    attention: int
    inner: int


_EAGER = {"llama": _Kept(2, 2, 2, 4, 4), "gpt_neox": _Kept(1, 0, 3, 6, 2), "vit": _Kept(2, 0, 2, 4, 2)}
_COMPILED = {"llama": _Kept(0, 1, 4, 3, 3), "gpt_neox": _Kept(0, 1, 3, 6, 2), "vit": _Kept(0, 1, 5, 3, 2)}
_RECOMPUTED = {"llama": _Kept(0, 1, 1, 3, 2), "gpt_neox": _Kept(0, 1, 0, 5, 1), "vit": _Kept(0, 1, 1, 3, 1)}


class Activations(NamedTuple):
    """Bytes on a device for one micro-batch."""

    kept: int
    """Between forward and backward."""

    working: int
    """The most on top: for a chunk of the loss, or in the backward pass of a block."""


def activations(profile: Profile, shape: ModelShape, wrapped: Sequence[LinearShape], *, device: str) -> Activations:
    """Count a rank's largest micro-batch on a 'cpu' or a 'cuda'. wrapped: the low-rank layers of a block, if any."""
    launch, precision, hidden = profile.launch, profile.precision, shape.hidden_size
    rows = profile.batch.forward_passes(launch.world_size or 1)[0] * shape.rows(profile.batch.sequence_length)
    product = _BFLOAT16 if precision.computes_in_bfloat16 else _FLOAT32
    rounded = precision.residual == "bfloat16" or precision.trains_in_bfloat16
    residual = hidden * (_BFLOAT16 if rounded else _FLOAT32)
    block = rows * _block_row(profile, shape, wrapped, product, residual, device=device)
    # The backward pass needs a copy of wrapped experts with their update, and frees it when it has its gradient.
    experts = product * sum(linear.weights for linear in wrapped if linear.is_expert)
    working = block  # its gradients take as much, or what checkpointing makes again
    working += experts * 4 // 3 if launch.gradient_checkpointing else 0
    kept = shape.layers * (rows * residual if launch.gradient_checkpointing else block + experts)
    kept += rows * (_FLOAT32 * hidden + (residual if shape.family == "llama" else 0))  # the last norm
    if precision.dtype == "bfloat16" and not wrapped and _kept_by(profile, device) is not _RECOMPUTED:
        kept += _BFLOAT16 * shape.layers * sum(linear.weights for linear in shape.linears)  # autocast's copies
    if not shape.classifies:
        trains_head = not wrapped or ("embeddings" if shape.tied else "head") not in profile.relora.frozen
        kept += product * hidden * (rows + shape.vocab_size * trains_head)  # gradients of the loss
        copied = product == _BFLOAT16 and (trains_head or not precision.rounds_others)
        working = max(working, _loss_working(shape, rows, product, device, trains_head, copied))
    return Activations(kept, working)


def evaluation_bytes(profile: Profile, shape: ModelShape) -> int:
    """Count a checkpoint's evaluation: its weights as evaluate.hold_as_computed holds them, and a forward pass.

    Ranks that share the model hold a part of the weights each. Not covered: a block gathered for a moment.
    """
    product = _BFLOAT16 if profile.precision.computes_in_bfloat16 else _FLOAT32
    head = 0 if shape.tied else shape.vocab_size * shape.hidden_size
    rounded = head + shape.layers * sum(linear.weights for linear in shape.linears)
    rows = profile.evaluation.batch_sequences * shape.rows(profile.batch.sequence_length)
    row = 2 * _FLOAT32 * shape.hidden_size + 4 * product * _inner(shape)
    logits = 0 if shape.classifies else min(rows, EVALUATION_ROWS) * shape.vocab_size * (product + 2 * _FLOAT32)
    launch = profile.launch
    ranks = launch.nproc_per_node if launch.sharding == "full" and launch.nproc_per_node != "gpu" else 1
    return (_FLOAT32 * (shape.parameters - rounded) + product * rounded) // ranks + max(rows * row, logits)


def _kept_by(profile: Profile, device: str) -> dict[str, _Kept]:
    if not profile.launch.compiles_on(device):
        return _EAGER
    return _RECOMPUTED if profile.launch.recompute_elementwise else _COMPILED


def _block_row(
    profile: Profile, shape: ModelShape, wrapped: Sequence[LinearShape], product: int, residual: int, *, device: str
) -> int:
    """Return the bytes that a block keeps for a row."""
    multiples, hidden = _kept_by(profile, device), shape.hidden_size
    kept = multiples[shape.family]
    size = kept.exact * _FLOAT32 * hidden + kept.residual * residual
    fewer = 0 if shape.key_value_size is None else 2 * (shape.attention_size - shape.key_value_size)  # keys and values
    attention = kept.attention * shape.attention_size - fewer
    size += product * (kept.hidden * hidden + attention + kept.inner * _inner(shape))
    size += shape.extra_norms * (_FLOAT32 + product)
    size += shape.scores * profile.batch.sequence_length * (_FLOAT32 + 2 * product)
    if multiples is _EAGER:  # autocast casts the input of each layer, the fast path that of siblings once
        alone = len(shape.linears) - len(sibling_groups([linear.name for linear in shape.linears]))
        return size + (product * hidden * alone if not wrapped and product == _BFLOAT16 else 0)
    size += product * profile.relora.rank * len(wrapped)
    if multiples is _RECOMPUTED:  # but attention's output only on CPUs
        return size + (product * shape.attention_size if device != "cpu" else 0)
    masked = wrapped and profile.relora.dropout > 0
    return size + ((product + 1) * hidden if masked else 0)  # a mask, and the input under it


def _loss_working(shape: ModelShape, rows: int, product: int, device: str, trains_head: bool, copied: bool) -> int:
    """Return what chunked_loss.py makes: a chunk's logits and their softmax; the head's copies and gradients."""
    classes, rounded = shape.vocab_size + added_classes(shape.vocab_size, device), product == _BFLOAT16
    logits = chunk_rows(rows, classes, device) * classes * (product + _FLOAT32 + _FLOAT32 * rounded)
    entries = classes * shape.hidden_size
    if not trains_head:
        return logits + entries * product * (copied + (classes > shape.vocab_size))
    return logits + entries * (product + _FLOAT32 + 2 * product * rounded)


def _inner(shape: ModelShape) -> int:
    return shape.linears[-1].in_features if shape.inner_size is None else shape.inner_size


def added_classes(classes: int, device: str) -> int:
    """Return the classes that are added to make products fast."""
    return 0 if device == "cpu" else -classes % _SIDE_ON_GPU


def chunk_rows(rows: int, classes: int, device: str) -> int:
    """Return the rows of a chunk: as many as the device's bound on logits lets, but not too few."""
    least, logits = (_ROWS, _LOGITS) if device == "cpu" else (_ROWS_ON_GPU, _LOGITS_ON_GPU)
    return min(rows, max(least, logits // classes))
