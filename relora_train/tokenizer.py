"""A tokenizer, trained or loaded, with the one token that separates documents.

A trained one is a byte-level BPE: it covers every text, and the same text gives the same tokenizer on any machine.
A loaded one is kept byte for byte. Text can never forge the separator, and nothing adds a second one: see `encoder`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from relora_train.durable import write_durably
from relora_train.errors import TokenizerError

DEFAULT_EOS_TOKEN = "<|endoftext|>"  # noqa: S105  # a token of text, no secret
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_USUAL_EOS_TOKENS = (DEFAULT_EOS_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_log = logging.getLogger("relora_train.tokenizer")


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

    @property
    def sha256(self) -> str:
        """Digest of tokenizer.json."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the two files that `AutoTokenizer.from_pretrained(directory)` needs."""
        write_durably(directory / TOKENIZER_CONFIG_FILE, self.config_text.encode())
        write_durably(directory / TOKENIZER_FILE, self.json_text.encode())  # last: with it, both are there

    def encoder(self) -> Tokenizer:
        """A `tokenizers.Tokenizer` that gives documents their ids, to be called with add_special_tokens=False.

        It neither truncates, pads nor draws at random, whatever the file says, and a special token's name in a text,
        the separator's first of all, is encoded as the characters it is made of.
        """
        return _document_encoder(json.loads(self.json_text), self.eos_token)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, eos_token: str | None = None) -> DocumentTokenizer:
    """Train a byte-level BPE with exactly `vocab_size` entries, or fewer where the text has no more pairs to merge.

    The same texts give the same bytes, in any order and with any number of threads. The separator is entry 0.
    """
    eos = eos_token or DEFAULT_EOS_TOKEN
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        _log.warning("The text gives a tokenizer of %d entries only, not %d; it has no more pairs.", found, vocab_size)
    return _described(tokenizer.to_str(), _default_config(eos), eos, "the trained tokenizer")


def load_tokenizer(path: str, *, eos_token: str | None = None) -> DocumentTokenizer:
    """Load a tokenizer.json, a directory or a hub id; the separator is `eos_token`, else one of the usual names.

    Raises TokenizerError when there is none, or no separator in it.
    """
    place = Path(path).expanduser()
    if place.is_file():
        json_text, config_text = _read(place), _read_if_there(place.with_name(TOKENIZER_CONFIG_FILE))
    elif (place / TOKENIZER_FILE).is_file():
        json_text, config_text = _read(place / TOKENIZER_FILE), _read_if_there(place / TOKENIZER_CONFIG_FILE)
    elif place.is_dir():
        json_text, config_text = _converted(path), _read_if_there(place / TOKENIZER_CONFIG_FILE)
    elif _HUB_ID.fullmatch(path) and not path.endswith(".json"):
        json_text, config_text = _from_hub(path)
    else:
        raise TokenizerError(
            f"{path} is no file and no directory. Correct tokenizer.path, or leave it out to train one."
        )
    eos = eos_token or _usual_eos_token(json_text, config_text, path)
    return _described(json_text, config_text or _default_config(eos), eos, path)


def _described(json_text: str, config_text: str, eos_token: str, name: str) -> DocumentTokenizer:
    tokenizer = _parsed(json_text, name)
    eos_id = tokenizer.token_to_id(eos_token)
    if eos_id is None:
        raise TokenizerError(f"{name} has no token {eos_token!r}. Name its end-of-text token in tokenizer.eos_token.")
    found = DocumentTokenizer(json_text, config_text, eos_token, eos_id, max(tokenizer.get_vocab().values()) + 1)
    if eos_id in found.encoder().encode(f"a{eos_token} {eos_token}", add_special_tokens=False).ids:
        raise TokenizerError(
            f"{name} encodes the text {eos_token!r} as the separator itself, so that a document could forge it. "
            "Name another token in tokenizer.eos_token."
        )
    return found


def _document_encoder(description: dict[str, Any], eos_token: str) -> Tokenizer:
    description["truncation"] = description["padding"] = None
    if description["model"].get("dropout"):
        description["model"]["dropout"] = None
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["content"] == eos_token
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _parsed(json_text: str, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(json_text)
    except Exception as error:  # the Rust side raises bare Exception
        raise TokenizerError(f"{name} is not a tokenizer.json that `tokenizers` reads: {error}.") from None


def _usual_eos_token(json_text: str, config_text: str | None, name: str) -> str:
    """The separator of documents. A chat model's own eos may end a turn instead, so it is asked last."""
    tokenizer = _parsed(json_text, name)
    configured = json.loads(config_text or "{}").get("eos_token")
    configured = configured.get("content") if isinstance(configured, dict) else configured
    for token in (*_USUAL_EOS_TOKENS, configured):
        if token and tokenizer.token_to_id(token) is not None:
            return str(token)
    raise TokenizerError(
        f"{name} has none of the usual end-of-text tokens ({', '.join(_USUAL_EOS_TOKENS)}). "
        "Name its own in tokenizer.eos_token."
    )


def _default_config(eos_token: str) -> str:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, indent=1) + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}.") from None


def _read_if_there(path: Path) -> str | None:
    return _read(path) if path.is_file() else None


def _from_hub(hub_id: str) -> tuple[str, str | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetched(file_name: str) -> str | None:
        try:
            return _read(Path(hf_hub_download(hub_id, file_name)))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    try:
        config_text, json_text = fetched(TOKENIZER_CONFIG_FILE), fetched(TOKENIZER_FILE)
    except Exception as error:  # several libraries' errors meet here: hub, http, sockets
        raise TokenizerError(
            f"{hub_id} is no file or directory here, and not to be had from the hub: {type(error).__name__}: {error}. "
            "Without a network, set tokenizer.path to a directory that holds its tokenizer.json."
        ) from error
    return json_text if json_text is not None else _converted(hub_id), config_text


def _converted(path: str) -> str:
    """tokenizer.json of a tokenizer that is kept in older files, converted by transformers."""
    from transformers import AutoTokenizer  # imports torch, hence only here

    try:
        backend = AutoTokenizer.from_pretrained(path).backend_tokenizer
    except Exception as error:  # converters raise whatever they meet
        raise TokenizerError(
            f"{path} holds no {TOKENIZER_FILE} and transformers makes none of it: {type(error).__name__}: {error}"
        ) from error
    return str(backend.to_str())
