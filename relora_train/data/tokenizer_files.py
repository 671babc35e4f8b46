"""The files of a tokenizer, from a file, a directory or the hub. Older formats are converted to tokenizer.json."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from relora_train.errors import TokenizerError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_OTHER_FILES = (
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model", "tekken.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, *_OTHER_FILES)
"""All that a tokenizer may consist of, where transformers looks for it; the first is always there."""

ANOTHER = "Name another in tokenizer.path, or train one on the text with tokenizer.train = true."
"""The remedy where a tokenizer cannot be used."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_tokenizer(path: str, revision: str | None) -> tuple[str, str | None]:
    """tokenizer.json and tokenizer_config.json."""
    place = Path(path).expanduser()
    if place.is_file():
        return _read(place), _read_json_if_there(place.with_name(TOKENIZER_CONFIG_FILE))
    if (place / TOKENIZER_FILE).is_file():
        return _read(place / TOKENIZER_FILE), _read_json_if_there(place / TOKENIZER_CONFIG_FILE)
    if place.is_dir():
        return _converted(path, None), _read_json_if_there(place / TOKENIZER_CONFIG_FILE)
    if _HUB_ID.fullmatch(path) and not path.endswith(".json"):
        return _from_hub(path, revision)
    raise TokenizerError(f"{path} is no file and no directory, so it holds no tokenizer. {ANOTHER}")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}.") from None


def _read_json_if_there(path: Path) -> str | None:
    if not path.is_file():
        return None
    text = _read(path)
    try:
        json.loads(text)
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}. Repair or remove it.") from None
    return text


def other_files(path: str, revision: str | None) -> dict[str, bytes]:
    """The files beside tokenizer.json that are there, of those that transformers looks for."""
    place = Path(path).expanduser()
    if not place.exists():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        found = {}
        for name in _OTHER_FILES:
            with suppress(EntryNotFoundError):  # also where it is not in the cache of a machine without a network
                found[name] = Path(hf_hub_download(path, name, revision=revision)).read_bytes()
        return found
    folder = place if place.is_dir() else place.parent
    return {name: (folder / name).read_bytes() for name in _OTHER_FILES if (folder / name).is_file()}


def _from_hub(hub_id: str, revision: str | None) -> tuple[str, str | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetched(file_name: str) -> str | None:
        try:
            return _read(Path(hf_hub_download(hub_id, file_name, revision=revision)))
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
    return json_text if json_text is not None else _converted(hub_id, revision), config_text


def _converted(path: str, revision: str | None) -> str:
    """tokenizer.json of a tokenizer that is kept in older files, converted by transformers."""
    from transformers import AutoTokenizer  # imports torch, hence only here

    try:
        backend = AutoTokenizer.from_pretrained(path, revision=revision).backend_tokenizer
    except Exception as error:  # converters raise whatever they meet
        raise TokenizerError(
            f"{path} holds no {TOKENIZER_FILE}, and no other files from which transformers makes one. {ANOTHER}"
        ) from error
    return str(backend.to_str())
