"""The kinds of models that objectives train, and what the config.json of one must say. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_train.errors import ModelNotFoundError, ModelUnsuitableError


@dataclass(frozen=True)
class LoadedAs:
    """The kind of model that an objective trains, in the words of transformers."""

    auto_class: str

    architectures: tuple[str, ...]
    """Part of the names of its classes. A class without a task, such as LlamaModel, has none."""

    leaves_heads: bool = False
    """True if a pretrained model may hold heads for other tasks, which are left out."""


CAUSAL_LM = LoadedAs("AutoModelForCausalLM", ("ForCausalLM", "LMHead"))
MASKED_LM = LoadedAs("AutoModelForMaskedLM", ("ForMaskedLM", "ForPreTraining"), leaves_heads=True)
SEQUENCE_CLASSIFIER = LoadedAs("AutoModelForSequenceClassification", ("For", "LMHead"), leaves_heads=True)
SEQ2SEQ = LoadedAs("AutoModelForSeq2SeqLM", ("ForConditionalGeneration", "ForSeq2Seq"))
IMAGE_CLASSIFIER = LoadedAs("AutoModelForImageClassification", ("ForImageClassification",))


def check_place(model: str | Path) -> Path | None:
    """Return what lies at the path; None for what may be a hub id. Raises ModelNotFoundError for a path to nothing."""
    directory = Path(model).expanduser()
    if directory.exists():
        return directory
    if str(model).startswith((".", "/", "~")):
        raise ModelNotFoundError(
            f"model.pretrained {str(model)!r} is no directory. Correct the path, or give a hub id."
        )
    return None


def read_config(directory: Path, kind: LoadedAs, *, key: str, planned: bool = False) -> int:
    """Return the number that the config.json of a local model has under `key`.

    Raises ModelNotFoundError for a directory without such a file or without safetensors, and as check_config. A plan
    may be made of a config.json alone.
    """
    place = f"model.pretrained {str(directory)!r}"
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except OSError:
        raise ModelNotFoundError(
            f"{place} has no config.json, so it is no model of transformers. Give a directory that save_pretrained "
            "wrote; GGUF and other formats are not read."
        ) from None
    except ValueError as error:
        raise ModelNotFoundError(f"{directory / 'config.json'} is not JSON: {error}. Copy the model again.") from None
    try:
        check_config(config, directory, kind)
        number = int({**config, **(config.get("text_config") or {})}[key])  # a part for text, beside others
    except (KeyError, TypeError, ValueError):
        raise ModelNotFoundError(
            f"{place} has a config.json without {key}, so it is no model that transformers loads for this objective. "
            "Correct the path."
        ) from None
    if not any(directory.glob("*.safetensors")) and not (planned and not any(directory.glob("*.bin"))):
        raise ModelNotFoundError(
            f"{place} holds no weights in safetensors, and others are never loaded: pickles can run code. Load the "
            "model with transformers where you trust it, and give what save_pretrained writes."
        )
    return number


def check_config(config: Mapping[str, Any], where: str | Path, kind: LoadedAs, *, made_as: str | None = None) -> None:
    """Raise ModelUnsuitableError for quantised weights, and for an architecture made for another task.

    made_as: the class that transformers makes of it. While that is unknown, a model of text and something else passes.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"{where} is no JSON object")
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for quantised in (part.get(key) for part in parts for key in ("quantization_config", "compression_config")):
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            raise ModelUnsuitableError(
                f"The weights of {str(where)!r} are quantised (quantization_config in its config.json, method "
                f"{method!r}). A merge into them would lose the update, or write damaged weights. Give the model's "
                "unquantised weights."
            )
    if made_as is None and "text_config" in config:
        return
    for name in config.get("architectures") or ():
        bare = name.endswith("Model") and "Head" not in name
        if not bare and name != made_as and not any(part in name for part in kind.architectures):
            raise ModelUnsuitableError(
                f"{str(where)!r} is a {name} (architectures in its config.json) and would be loaded as "
                f"{made_as or kind.auto_class}: a part of it would be lost, and what it lacks made up. Give a model "
                "that was made for this objective, or set `objective` to what this one was made for."
            )
