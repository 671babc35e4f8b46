"""How much of the validation text also stands in the training text: the share of its 13-grams of tokens found there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NGRAM_TOKENS = 13
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_CHUNK_TOKENS = 1 << 20
_ONE_GRAM_IN = 8
_VALIDATION_TOKENS = 1 << 22
_TRAINING_TOKENS = 1 << 25

_Hashes = NDArray[np.uint64]
_Tokens = NDArray[np.uint32]
_TokenType = np.dtype[np.uint16] | np.dtype[np.uint32]


def ngram_overlap(
    validation: Sequence[Path],
    training: Sequence[Path],
    *,
    dtype: _TokenType,
    eos_id: int,
) -> float:
    """Share, 0 to 1, of sampled validation 13-grams that occur in training; grams across documents are left out.

    Bounded: every eighth gram of 4M validation tokens, looked for in 32M training tokens taken from shards at even
    distances. With more training text than that it is a lower bound.
    """
    grams = [_hashes(tokens, eos_id) for tokens in _chunks(validation, dtype, _VALIDATION_TOKENS)]
    wanted, counts = np.unique(np.concatenate(grams) if grams else np.empty(0, np.uint64), return_counts=True)
    found = np.zeros(len(wanted), dtype=bool)
    for tokens in _chunks(training, dtype, _TRAINING_TOKENS):
        found |= np.isin(wanted, _hashes(tokens, eos_id))
    return float(counts[found].sum() / max(1, counts.sum()))


def _chunks(shards: Sequence[Path], dtype: _TokenType, limit: int) -> Iterator[_Tokens]:
    total = sum(path.stat().st_size for path in shards) // dtype.itemsize
    left = limit
    for path in shards[:: max(1, -(-total // limit))]:
        size = path.stat().st_size // dtype.itemsize
        for start in range(0, size, _CHUNK_TOKENS):
            if left <= 0:
                return
            count = min(_CHUNK_TOKENS + NGRAM_TOKENS - 1, size - start)  # chunks share grams, and lose none
            left -= count
            raw = np.fromfile(path, dtype=dtype, count=count, offset=start * dtype.itemsize)
            yield raw.astype(np.uint32)


def _hashes(tokens: _Tokens, eos_id: int) -> _Hashes:
    """Hashes of the sampled 13-grams that hold no separator."""
    size = len(tokens) - NGRAM_TOKENS + 1
    if size <= 0:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros(size, dtype=np.uint64)
    for offset in range(NGRAM_TOKENS):
        hashes *= _MULTIPLIER
        hashes += tokens[offset : offset + size]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MULTIPLIER
    separators = np.cumsum(np.concatenate([[0], tokens == eos_id]))
    whole = separators[NGRAM_TOKENS:] == separators[:size]
    sampled: _Hashes = hashes[whole & (hashes >> np.uint64(32) & np.uint64(_ONE_GRAM_IN - 1) == 0)]
    return sampled
