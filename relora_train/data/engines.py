"""Text -> token ids by two engines that give the same ids: `tokenizers`, and tiktoken where that is proven.

tiktoken is five times as fast. Both cut text by the same pattern and merge the pair of lowest rank first; they differ
in what a pair is. `tokenizers` merges the pairs of its list, tiktoken any neighbours whose bytes join to a token. They
agree if every token, given alone, is encoded as itself, and if ids grow along the list of merges and every merge's
parts come before it. For let tiktoken join neighbours a, b to the token t. Their outer borders were never merged
across, so the state between them is what t alone reaches from all merges before its own; t alone is encoded as t, by
one last merge; hence a, b are the two parts of that merge, and `tokenizers` makes it too. `why_not_tiktoken` checks the
premises on the tokenizer at hand, and a test compares the character classes of both pattern engines.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer

from relora_train.data.tokenizer import TRICKY_TEXTS, DocumentTokenizer
from relora_train.errors import TokenizerError

Engine = Literal["tokenizers", "tiktoken"]
Ids = NDArray[np.uint32]

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_log = logging.getLogger("relora_train.data.tokenizer")


class Encoder(Protocol):
    """Ids of each text, without separator, special tokens encoded as their characters."""

    def encode(self, texts: Sequence[str]) -> list[Ids]: ...


def make_encoder(tokenizer: DocumentTokenizer, engine: Engine) -> Encoder:
    """The encoder of an engine that `choose_engine` has named."""
    if engine == "tiktoken":
        return _TiktokenEncoder(tokenizer)
    return _TokenizersEncoder(tokenizer)


def choose_engine(
    tokenizer: DocumentTokenizer, wanted: Literal["auto", "tokenizers", "tiktoken"], sample: Sequence[str]
) -> Engine:
    """tiktoken where its ids are proven the same and equal on the sample; else tokenizers.

    Raises TokenizerError when tiktoken is asked for by name and cannot be used.
    """
    if wanted == "tokenizers":
        return "tokenizers"
    reason = why_not_tiktoken(tokenizer) or _difference(tokenizer, [*TRICKY_TEXTS, *sample])
    if reason is None:
        return "tiktoken"
    if wanted == "tiktoken":
        raise TokenizerError(f"data.engine 'tiktoken' would not give this tokenizer's ids: {reason}. Use 'auto'.")
    _log.info("Encoding with tokenizers: tiktoken is faster, but %s.", reason)
    return "tokenizers"


def why_not_tiktoken(tokenizer: DocumentTokenizer) -> str | None:
    """Return what breaks the proof that tiktoken gives the same ids; None when it holds."""
    description = json.loads(tokenizer.json_text)
    model = description["model"]
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback"):
        if model.get(setting):
            return f"its model sets {setting}"
    if description["normalizer"] is not None:
        return "it has a normalizer"
    cutter = description["pre_tokenizer"] or {}
    if cutter.get("type") != "ByteLevel" or cutter.get("add_prefix_space") or not cutter.get("use_regex", True):
        return "its pre-tokenizer is not a plain ByteLevel"
    if any(not token["special"] and token["content"] != tokenizer.eos_token for token in description["added_tokens"]):
        return "it has added tokens that are not special"
    return _vocabulary_fault(model, {token["content"] for token in description["added_tokens"]}, tokenizer.encoder())


def _vocabulary_fault(model: dict[str, Any], added: set[str], encoder: Tokenizer) -> str | None:
    vocabulary: dict[str, int] = model["vocab"]
    known = set(_BYTE_OF)
    if missing := known - vocabulary.keys():
        return f"{len(missing)} bytes have no token"
    last_id = -1
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        token_id = vocabulary.get(token, -1)
        if token in known or token in added or not {left, right} <= known or token_id <= last_id:
            return f"its merge {left!r} + {right!r} is out of order"
        known.add(token)
        last_id = token_id
    for token in known:
        if [piece.id for piece in encoder.model.tokenize(token)] != [vocabulary[token]]:
            return f"its token {token!r} is not encoded as itself"
    return None


def _difference(tokenizer: DocumentTokenizer, texts: Sequence[str]) -> str | None:
    expected = _TokenizersEncoder(tokenizer).encode(texts)
    found = _TiktokenEncoder(tokenizer).encode(texts)
    for text, one, other in zip(texts, expected, found, strict=True):
        if not np.array_equal(one, other):
            return f"the ids of a text that begins with {text[:40]!r} differ"
    return None


class _TokenizersEncoder:
    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self._tokenizer = tokenizer.encoder()

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


class _TiktokenEncoder:
    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        model = json.loads(tokenizer.json_text)["model"]
        tokens = [*_BYTE_OF, *("".join(m.split(" ")) if isinstance(m, str) else "".join(m) for m in model["merges"])]
        self._encoding = tiktoken.Encoding(
            "document",
            pat_str=_GPT2_PATTERN,
            mergeable_ranks={bytes(_BYTE_OF[c] for c in token): model["vocab"][token] for token in tokens},
            # Never found in text, since none is allowed below; without one, encode_to_numpy is half as fast.
            special_tokens={tokenizer.eos_token: tokenizer.eos_id},
        )

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        # Nothing allowed, nothing refused: special tokens are text.
        return [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]


def _byte_characters() -> dict[str, int]:
    """The 256 characters by which a byte-level vocabulary writes bytes, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_characters()
