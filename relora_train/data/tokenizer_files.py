"""The files of a tokenizer, from a file, a directory or the hub. Older formats are converted to tokenizer.json."""

import json
import re
from contextlib import suppress
from pathlib import Path

from relora_train.errors import TokenizerError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_OTHER_FILES = (
    "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE_FILE, "tokenizer.model", "tekken.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, *_OTHER_FILES)
"""All that a tokenizer may consist of, where transformers looks for it; the first is always there."""

ANOTHER = "Name another in tokenizer.path, or train one on the text with tokenizer.train = true."
"""The remedy where a tokenizer cannot be used."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_tokenizer(path: str, revision: str | None) -> tuple[str, str | None]:
    """Return the text of tokenizer.json, and of tokenizer_config.json if there is one."""
    place = Path(path).expanduser()
    if place.is_file() or place.is_dir():
        found = place if place.is_file() else place / TOKENIZER_FILE
        json_text = _read(found) if found.is_file() else _converted(path, None)
        config = found.with_name(TOKENIZER_CONFIG_FILE)
        config_text = _read(config) if config.is_file() else None
        try:
            json.loads("{}" if config_text is None else config_text)
        except ValueError as error:
            raise TokenizerError(f"{config} is not JSON: {error}. Repair or remove it.") from None
        return json_text, config_text
    if _HUB_ID.fullmatch(path) and not path.endswith(".json"):
        return _from_hub(path, revision)
    raise TokenizerError(f"{path} is no file and no directory, so it holds no tokenizer. {ANOTHER}")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}.") from None


def other_files(path: str, revision: str | None) -> dict[str, bytes]:
    """Return the files beside tokenizer.json that are there, of those that transformers looks for."""
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

    texts: dict[str, str | None] = {}
    try:
        for name in (TOKENIZER_CONFIG_FILE, TOKENIZER_FILE):
            try:
                texts[name] = _read(Path(hf_hub_download(hub_id, name, revision=revision)))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                texts[name] = None
    except Exception as error:  # several libraries' errors meet here: hub, http, sockets
        raise TokenizerError(
            f"{hub_id} is no file or directory here, and not to be had from the hub: {type(error).__name__}: {error}. "
            "Without a network, set tokenizer.path to a directory that holds its tokenizer.json."
        ) from error
    json_text = texts[TOKENIZER_FILE]
    return _converted(hub_id, revision) if json_text is None else json_text, texts[TOKENIZER_CONFIG_FILE]


def _converted(path: str, revision: str | None) -> str:
    """Return tokenizer.json of a tokenizer that is kept in older files, converted by transformers."""
    from transformers import AutoTokenizer  # imports torch, hence only here

    try:
        backend = AutoTokenizer.from_pretrained(path, revision=revision).backend_tokenizer
    except Exception as error:  # converters raise whatever they meet
        raise TokenizerError(
            f"{path} holds no {TOKENIZER_FILE}, and no other files from which transformers makes one. {ANOTHER}"
        ) from error
    return str(backend.to_str())
