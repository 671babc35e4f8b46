"""A tokenizer, trained or loaded, with the one token that separates documents.

A trained one is a byte-level BPE: it covers every text, and the same text gives the same tokenizer on any machine.
A loaded one is kept byte for byte. Text can never forge the separator, and nothing adds a second one: see `encoder`.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from relora_train.data.tokenizer_files import (
    ANOTHER,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    find_tokenizer,
    other_files,
)
from relora_train.errors import TokenizerError
from relora_train.storage.durable import write_durably

DEFAULT_EOS_TOKEN = "<|endoftext|>"  # noqa: S105  # a token of text, no secret
DEFAULT_MASK_TOKEN = "[MASK]"  # noqa: S105
_USUAL_EOS_TOKENS = (DEFAULT_EOS_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
_USUAL_MASK_TOKENS = ("[MASK]", "<mask>", "<|mask|>")
_USUAL_BOS_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]")
TRICKY_TEXTS = (
    "it's we'll they'VE don't",
    "  two  spaces\t\ttabs \n\n newlines\r\n \u00a0\u2003 wide\u3000",
    "x=1234567890;y^2!?...<|endoftext|><|endoftext|> </s>",
    "naïve café ½ ١٢٣ Ⅷ 漢字かな 한국어 ไทย हिन्दी 👩‍👩‍👧‍👦 e\u0301\u200d\ufeff\x00\x1c",
)
"""On which two ways of encoding show that they differ."""

_log = logging.getLogger("relora_train.data.tokenizer")


@dataclass(frozen=True)
class DocumentTokenizer:
    """tokenizer.json as text, and what documents need of it."""

    json_text: str
    config_text: str
    """tokenizer_config.json, for AutoTokenizer."""

    eos_token: str
    eos_id: int
    vocab_size: int
    """One more than the largest id: the rows an embedding needs."""

    bos_ids: tuple[int, ...] = ()
    """The ids that stand before each document; usually none or one."""

    others: Mapping[str, bytes] = field(default_factory=dict)
    """Its other files by name, such as a chat template: for whoever uses the model."""

    @property
    def sha256(self) -> str:
        """Digest of tokenizer.json."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write its files, of which `AutoTokenizer.from_pretrained(directory)` needs two."""
        for name, content in self.others.items():
            write_durably(directory / name, content)
        write_durably(directory / TOKENIZER_CONFIG_FILE, self.config_text.encode())
        write_durably(directory / TOKENIZER_FILE, self.json_text.encode())  # last: with it, both are there

    def encoder(self) -> Tokenizer:
        """Return a `tokenizers.Tokenizer` that gives documents their ids; call it with add_special_tokens=False.

        It neither truncates, pads nor draws at random, whatever the file says. A special token's name in a text, the
        separator's first of all, is encoded as the characters it is made of.
        """
        return _document_encoder(json.loads(self.json_text), {self.eos_id, *self.bos_ids})

    def chat_encoder(self) -> Tokenizer:
        """Return the same for a text that a chat template wrote, whose special tokens are meant as such."""
        encoder = self.encoder()
        encoder.encode_special_tokens = False
        return encoder

    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the ids that stand before a text, between two texts and after them, for a model that reads them whole.

        They are the tokenizer's own ([CLS], [SEP], [SEP]); where it puts nothing between or after, the separator.
        """
        tokenizer = Tokenizer.from_str(self.json_text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        one, two = tokenizer.encode("a").ids, tokenizer.encode("a", "a").ids
        size = len(plain)
        places = [n for n in range(len(two)) if two[n : n + size] == plain]
        before = next((n for n in range(len(one)) if one[n : n + size] == plain), 0)
        between = two[places[0] + size : places[-1]] if len(places) > 1 else []
        separator = (self.eos_id,)
        return self.bos_ids, tuple(between) or separator, tuple(one[before + size :]) or separator


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, eos_token: str | None = None, mask_token: str | None = None
) -> DocumentTokenizer:
    """Train a byte-level BPE with exactly `vocab_size` entries, or fewer where the text has no more pairs to merge.

    The same texts give the same bytes, in any order and with any number of threads. The separator is entry 0, a mask
    token, if there is to be one, entry 1.
    """
    eos = eos_token or DEFAULT_EOS_TOKEN
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos, *filter(None, [mask_token])],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        _log.warning("The text gives a tokenizer of %d entries only, not %d; it has no more pairs.", found, vocab_size)
    return _described(tokenizer.to_str(), _default_config(eos, mask_token), eos, "the trained tokenizer")


def find_mask_id(directory: Path, mask_token: str | None) -> int:
    """Return the id of the mask token of a tokenizer: the one named, its own, or one of the usual names.

    Raises TokenizerError where there is none.
    """
    json_text, config_text = find_tokenizer(str(directory), None)
    return mask_id_of(json_text, config_text, mask_token, str(directory))


def mask_id_of(json_text: str, config_text: str | None, mask_token: str | None, name: str) -> int:
    """Do what find_mask_id does for a tokenizer that was read already."""
    ids = _parsed(json_text, name).token_to_id
    tokens = (mask_token,) if mask_token else (named_token(config_text, "mask_token"), *_USUAL_MASK_TOKENS)
    found = next((number for token in tokens if token and (number := ids(token)) is not None), None)
    if found is None:
        raise TokenizerError(
            f"The tokenizer {name} has no mask token ({', '.join(filter(None, tokens))}), and objective 'masked_lm' "
            "hides tokens behind one. Name its own in tokenizer.mask_token, or use another tokenizer."
        )
    return found


def load_tokenizer(
    path: str, *, eos_token: str | None = None, revision: str | None = None, bos: Literal["auto"] | bool = "auto"
) -> DocumentTokenizer:
    """Load a tokenizer.json, a directory or a hub id; the separator is `eos_token`, else one of the usual names.

    bos: whether documents begin with its BOS token; 'auto' where the tokenizer puts it before a text itself.
    Raises TokenizerError when there is none, no separator in it, or no BOS token where one is asked for.
    """
    json_text, config_text = find_tokenizer(path, revision)
    eos = eos_token
    if not eos:  # a chat model's own eos may end a turn instead of a document, so it is asked last
        ids = _parsed(json_text, path).token_to_id
        tokens = (*_USUAL_EOS_TOKENS, named_token(config_text, "eos_token"))
        eos = next((str(token) for token in tokens if token and ids(token) is not None), None)
    if not eos:
        raise TokenizerError(
            f"{path} has none of the usual end-of-text tokens ({', '.join(_USUAL_EOS_TOKENS)}). "
            "Name its own in tokenizer.eos_token."
        )
    found = _described(json_text, config_text or _default_config(eos), eos, path, bos=bos)
    return replace(found, others=other_files(path, revision))


def differing_ids(path: str, revision: str | None, other: DocumentTokenizer) -> str | None:
    """Return how the ids of the tokenizer at `path` differ from those of another one; None where they are the same.

    Raises TokenizerError when there is none at `path`.
    """
    json_text, _ = find_tokenizer(path, revision)
    if json_text == other.json_text:
        return None
    tokenizer = _parsed(json_text, path)
    entries, others = tokenizer.get_vocab(), _parsed(other.json_text, "the other tokenizer").get_vocab()
    if moved := sum(entries.get(token) != number for token, number in others.items()):
        return f"{moved:,} of its {len(others):,} tokens have another id there, or none"
    encoders = (_document_encoder(json.loads(json_text), {other.eos_id, *other.bos_ids}), other.encoder())
    for text in TRICKY_TEXTS:
        ours, theirs = (encoder.encode(text, add_special_tokens=False).ids for encoder in encoders)
        if ours != theirs:
            return f"the tokens are the same, but a text such as {text[:24]!r} is cut into others"
    return None


@lru_cache(maxsize=4)  # every source of a mixture asks several times; parsing and trying take 0.15 s
def _described(
    json_text: str, config_text: str, eos_token: str, name: str, *, bos: Literal["auto"] | bool = "auto"
) -> DocumentTokenizer:
    tokenizer = _parsed(json_text, name)
    eos_id = tokenizer.token_to_id(eos_token)
    if eos_id is None:
        raise TokenizerError(f"{name} has no token {eos_token!r}. Name its end-of-text token in tokenizer.eos_token.")
    entries = max(tokenizer.get_vocab().values()) + 1
    bos_ids = _bos_ids(tokenizer, config_text, eos_id, name, wanted=bos)
    found = DocumentTokenizer(json_text, config_text, eos_token, eos_id, entries, bos_ids)
    encoder = found.encoder()
    if not encoder.encode("a 1\n", add_special_tokens=False).ids:  # transformers makes one up where it finds no file
        raise TokenizerError(f"{name} holds no tokenizer, or one without an entry for any text. {ANOTHER}")
    for marker, remedy in [(eos_id, "tokenizer.eos_token"), *((number, "data.bos = false") for number in bos_ids)]:
        token = tokenizer.id_to_token(marker)
        if marker in encoder.encode(f"a{token} {token}", add_special_tokens=False).ids:
            raise TokenizerError(
                f"{name} encodes the text {token!r} as the token that stands between documents, so that a document "
                f"could forge it. Use another: {remedy}."
            )
    return found


def _bos_ids(
    tokenizer: Tokenizer, config_text: str, eos_id: int, name: str, *, wanted: Literal["auto"] | bool
) -> tuple[int, ...]:
    """Return what the tokenizer puts before a text itself; where it puts nothing and a BOS token is wanted, that."""
    if wanted is False:
        return ()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    plain, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    before = next((n for n in range(len(whole) + 1) if whole[n : n + len(plain)] == plain), 0)
    own = tuple(whole[:before])
    if own and own != (eos_id,):  # the separator of the document before stands there already
        return own
    if wanted == "auto":
        return ()
    for token in filter(None, (named_token(config_text, "bos_token"), *_USUAL_BOS_TOKENS)):
        if (number := tokenizer.token_to_id(token)) is not None:
            return (number,)
    raise TokenizerError(
        f"{name} names no BOS token in its {TOKENIZER_CONFIG_FILE} and has none of the usual ones "
        f"({', '.join(_USUAL_BOS_TOKENS)}), and data.bos = true asks for one. Set data.bos to 'auto'."
    )


def _document_encoder(description: dict[str, Any], markers: Collection[int]) -> Tokenizer:
    """Return the encoder of a tokenizer.json; no text may be encoded as one of `markers`."""
    description["truncation"] = description["padding"] = None
    if description["model"].get("dropout"):
        description["model"]["dropout"] = None
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["id"] in markers
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _parsed(json_text: str, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(json_text)
    except Exception as error:  # the Rust side raises bare Exception
        raise TokenizerError(
            f"The {TOKENIZER_FILE} of {name} cannot be read: {str(error).strip(' .')}. Copy it again. {ANOTHER}"
        ) from None


def named_token(config_text: str | None, role: str) -> str | None:
    """Return the token that tokenizer_config.json names for a role."""
    named = json.loads(config_text or "{}").get(role)
    return named.get("content") if isinstance(named, dict) else named


def _default_config(eos_token: str, mask_token: str | None = None) -> str:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
    config |= {"mask_token": mask_token} if mask_token else {}
    return json.dumps({**config, "clean_up_tokenization_spaces": False}, indent=1) + "\n"
