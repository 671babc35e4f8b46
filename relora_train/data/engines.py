"""Text -> token ids by two engines that give the same ids: `tokenizers`, and tiktoken where that is proven.

tiktoken is five times as fast. Both cut text by the same pattern and merge the pair of lowest rank first; they differ
in what a pair is. `tokenizers` merges the pairs of its list, tiktoken any neighbours whose bytes join to a token. They
agree on two conditions. Every token, given alone, is encoded as itself. Ids grow along the list of merges, and every
merge's parts come before it.

For let tiktoken join neighbours a, b to the token t. Their outer borders were never merged across, so the state between
them is what t alone reaches from all merges before its own. t alone is encoded as t, by one last merge; hence a, b are
the two parts of that merge, and `tokenizers` makes it too. `why_not_tiktoken` checks the
premises on the tokenizer at hand, and a test compares the character classes of both pattern engines.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import tiktoken
from numpy.typing import NDArray

from relora_train.data.tokenizer import TRICKY_TEXTS, DocumentTokenizer
from relora_train.errors import TokenizerError

Engine = Literal["tokenizers", "tiktoken"]
Ids = NDArray[np.uint32]

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""The 256 characters by which a byte-level vocabulary writes bytes, as GPT-2 chose them."""

_log = logging.getLogger("relora_train.data.tokenizer")


Encode = Callable[[Sequence[str]], list[Ids]]
"""Gives the ids of each text, without separator, special tokens encoded as their characters."""


def make_encoder(tokenizer: DocumentTokenizer, engine: Engine) -> Encode:
    """Return the encoder of an engine that `choose_engine` has named."""
    if engine == "tokenizers":
        slow = tokenizer.encoder()

        def encode(texts: Sequence[str]) -> list[Ids]:
            encodings = slow.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

        return encode
    # Never found in text, since none is allowed below; without one, encode_to_numpy is half as fast.
    fast = _tiktoken(tokenizer, {tokenizer.eos_token: tokenizer.eos_id})
    # Nothing allowed, nothing refused: special tokens are text.
    return lambda texts: [fast.encode_to_numpy(text, disallowed_special=()) for text in texts]


ChatEncode = Callable[[Sequence[str]], tuple[list[Ids], NDArray[np.int64]]]
"""Gives the ids of each text, special tokens as such, and where each token begins and ends in the UTF-8 of all texts
laid end to end: (ids of all, 2)."""


def make_chat_encoder(tokenizer: DocumentTokenizer, engine: Engine) -> ChatEncode:
    """Return the encoder of texts that a chat template wrote, with the engine that `choose_engine` has named."""
    description = json.loads(tokenizer.json_text)
    added, sizes = description["added_tokens"], _token_sizes(tokenizer, description)
    flagged = any(token[flag] for token in added for flag in ("lstrip", "rstrip", "single_word"))
    names = sorted(token["content"] for token in added)
    begins_another = any(following.startswith(name) for name, following in pairwise(names))
    slow = tokenizer.chat_encoder()

    def ids_of(texts: Sequence[str]) -> list[Ids]:
        encodings = slow.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    if engine == "tiktoken" and not flagged and not begins_another:  # it would find either of two such names
        fast = _tiktoken(tokenizer, {token["content"]: token["id"] for token in added})
        ids_of = lambda texts: [fast.encode_to_numpy(text, allowed_special="all") for text in texts]  # noqa: E731

    def encode(texts: Sequence[str]) -> tuple[list[Ids], NDArray[np.int64]]:
        ids = ids_of(texts)
        ends = np.cumsum(sizes[np.concatenate(ids)])
        text_ends = np.cumsum([len(text.encode()) for text in texts])
        if np.array_equal(np.concatenate([[0], ends])[np.cumsum([len(one) for one in ids])], text_ends):
            return ids, np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
        places = list[NDArray[np.int64]]()
        for number, (text, end) in enumerate(zip(texts, text_ends, strict=True)):  # at half the speed
            encoding = slow.encode(text, add_special_tokens=False)
            before = end - len(text.encode()) + np.cumsum([0, *(len(character.encode()) for character in text)])
            places.append(before[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)])
            ids[number] = np.array(encoding.ids, dtype=np.uint32)
        return ids, np.concatenate(places)

    return encode


def _token_sizes(tokenizer: DocumentTokenizer, description: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return the bytes of text behind each token; more than any text has where tokens are of another kind."""
    cutter, vocabulary = description["pre_tokenizer"] or {}, description["model"]["vocab"]
    last = (cutter.get("pretokenizers") or [cutter])[-1]
    added = {token["content"]: token["id"] for token in description["added_tokens"]}
    if description["model"]["type"] != "BPE" or description["normalizer"] or last.get("type") != "ByteLevel":
        return np.full(tokenizer.vocab_size, 1 << 40)
    sizes = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token, number in vocabulary.items():
        sizes[number] = len(token)
    for token, number in added.items():
        sizes[number] = len(token.encode())
    return sizes


def _tiktoken(tokenizer: DocumentTokenizer, special_tokens: dict[str, int]) -> tiktoken.Encoding:
    model = json.loads(tokenizer.json_text)["model"]
    tokens = [*_BYTE_OF, *("".join(m.split(" ")) if isinstance(m, str) else "".join(m) for m in model["merges"])]
    return tiktoken.Encoding(
        "document",
        pat_str=_GPT2_PATTERN,
        mergeable_ranks={bytes(_BYTE_OF[c] for c in token): model["vocab"][token] for token in tokens},
        special_tokens=special_tokens,
    )


def choose_engine(
    tokenizer: DocumentTokenizer, wanted: Literal["auto", "tokenizers", "tiktoken"], sample: Sequence[str]
) -> Engine:
    """Return tiktoken where its ids are proven the same and equal on the sample; else tokenizers.

    Raises TokenizerError when tiktoken is asked for by name and cannot be used.
    """
    if wanted == "tokenizers":
        return "tokenizers"
    reason = why_not_tiktoken(tokenizer)
    if reason is None:
        texts = [*TRICKY_TEXTS, *sample]
        slow, fast = (make_encoder(tokenizer, engine)(texts) for engine in get_args(Engine))
        differ = (text for text, a, b in zip(texts, slow, fast, strict=True) if not np.array_equal(a, b))
        reason = next((f"the ids of a text that begins with {text[:40]!r} differ" for text in differ), None)
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
    added = {token["content"] for token in description["added_tokens"]}
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
    encoder = tokenizer.encoder()
    for token in known:
        if [piece.id for piece in encoder.model.tokenize(token)] != [vocabulary[token]]:
            return f"its token {token!r} is not encoded as itself"
    return None
