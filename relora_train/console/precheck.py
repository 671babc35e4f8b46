"""What can be known to fail before anything starts: paths, tokenizer and model that do not fit. Seconds, no network.

Everything here is checked again where it matters; this only spares the wait. Imports no torch and no Prefect.
"""

from __future__ import annotations

import json
from pathlib import Path

from relora_train.config import Profile
from relora_train.errors import ModelNotFoundError, VocabularyMismatchError


def check_inputs(profile: Profile) -> str | None:
    """Refuse sources, tokenizers and models on this machine that cannot work; return the dataset's id if it is known.

    None for sources that lie on a hub or in a store: asking them takes time that belongs to the run.
    Raises SourceUnreadableError, TokenizerError, ModelNotFoundError, VocabularyMismatchError.
    """
    from relora_train.prepare import describe_dataset

    _check_pretrained(profile)
    if profile.data.source == "hub" or any("://" in path for path in profile.data.paths):
        return None
    if profile.tokenizer.path and not Path(profile.tokenizer.path).expanduser().exists():
        return None  # perhaps on a hub
    return describe_dataset(profile.data, profile.tokenizer)[0]


def _check_pretrained(profile: Profile) -> None:
    """A local model must have a configuration, and rows for every token of a local tokenizer."""
    directory = Path(profile.model.pretrained).expanduser() if profile.model.pretrained else None
    if directory is None or not directory.is_dir():
        return
    try:
        rows = int(json.loads((directory / "config.json").read_bytes())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelNotFoundError(
            f"model.pretrained {str(directory)!r} has no config.json that names a vocab_size, so it is no model of "
            "transformers. Correct the path."
        ) from None
    entries = profile.tokenizer.vocab_size
    if profile.tokenizer.path is not None:
        if not Path(profile.tokenizer.path).expanduser().exists():
            return
        from relora_train.tokenizer import load_tokenizer

        entries = load_tokenizer(profile.tokenizer.path, eos_token=profile.tokenizer.eos_token).vocab_size
    if entries > rows:
        raise VocabularyMismatchError(
            f"The tokenizer has {entries} entries, the embedding of {directory} only {rows} rows. "
            "Use the model's own tokenizer (tokenizer.path)."
        )
