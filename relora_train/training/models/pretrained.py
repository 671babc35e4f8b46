"""Load a model of transformers from a directory or the hub: all of it, or an error that says what is wrong."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from relora_train.checkpoints.manifest import Dtype
from relora_train.errors import ModelNotFoundError, ModelUnsuitableError
from relora_train.process import is_out_of_memory
from relora_train.training.files import MODEL_FILE
from relora_train.training.models.kinds import CAUSAL_LM, LoadedAs, check_config, check_place

_BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")
"""Names in old files of what is made from the configuration today, besides those that transformers itself knows."""

_TEXT_PART = re.compile(r"^(model\.)?language_model\.(model\.)?")
"""The beginning of the names of the part for text, in the files of a model that also sees or hears."""

_NAMED = 3
_LOGGER = logging.getLogger(__name__)
_DTYPES: dict[str, Dtype] = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class NewHead:
    """A head for classes that a pretrained model may lack."""

    seed: int
    classes: tuple[str, ...] | None
    """Their names; None: as the model's configuration has them."""

    pad_id: int | None
    """The id that stands where there is no token, for a model that names none."""

    def describe(self, config: Any) -> None:
        """Write classes and padding into a model's configuration."""
        if self.classes is not None:
            config.id2label = dict(enumerate(self.classes))
            config.label2id = {name: number for number, name in enumerate(self.classes)}
        if config.pad_token_id is None:
            config.pad_token_id = self.pad_id


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    kind: LoadedAs = CAUSAL_LM,
    tells: bool = True,
    head: NewHead | None = None,
) -> nn.Module:
    """Return any model that this class of transformers knows, from a directory or the hub, in float32.

    tells: warn of what is left out. head: what to make where the files hold no head, or one of another shape.

    Every value comes from the files. If they lack a tensor or hold one more, if it is quantised or was made for another
    task, that is a ModelUnsuitableError. No pickle is ever loaded and no code of a checkpoint is ever run: such a one
    is a ModelNotFoundError.
    """
    with _reading(path):
        loader, config, attention, is_part = _loader(path, revision, kind, tells)
        made = loader._model_mapping[type(config)] if is_part else loader
        if head is not None:
            head.describe(config)
        with torch.random.fork_rng(devices=[], enabled=head is not None):
            if head is not None:
                torch.manual_seed(head.seed)  # nothing else is drawn
            model, found = made.from_pretrained(
                None if is_part else _place(path),
                config=config,
                state_dict=_text_part(path, revision) if is_part else None,
                revision=revision,
                dtype=torch.float32,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,  # not asked: a worker's standard input never answers
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused here, by name
            )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ModelUnsuitableError(
                f"{str(path)!r} holds a PEFT adapter beside or instead of a model. Merge it into its base (peft's "
                "merge_and_unload) and give what that saves."
            )
    unexpected = [name for name in found["unexpected_keys"] if not _BUFFERS.search(name)]
    if kind.leaves_heads and (others := [name for name in unexpected if _of_a_head(model, name)]):
        _LOGGER.info("Left out of %s, as they are of heads for other tasks: %s.", path, _listed(others))
        unexpected = [name for name in unexpected if name not in others]
    missing, mismatched = list(found["missing_keys"]), [str(entry[0]) for entry in found["mismatched_keys"]]
    if head is not None and (new := [name for name in (*missing, *mismatched) if _of_a_head(model, name)]):
        _LOGGER.warning("NEW HEAD: %s has none for this task, so these are drawn by the seed: %s.", path, _listed(new))
        missing, mismatched = ([name for name in names if name not in new] for names in (missing, mismatched))
    check_tensors(path, missing, mismatched, unexpected)
    if wrong := [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]:
        raise ModelUnsuitableError(
            f"Not every value is finite in {_listed(wrong)} of {str(path)!r}, so its loss is nan before any update. "
            "Copy the model again, or give one that was saved whole."
        )
    return cast(nn.Module, model)


def dtype_of_files(path: str | Path, *, revision: str | None = None) -> Dtype | None:
    """Return the dtype of most values in the files that load_model has read; None where that cannot be told."""
    values: Counter[Dtype] = Counter()
    with suppress(OSError, ValueError, KeyError, TypeError, SafetensorError):  # informative: no run ends here
        for file in _weight_files(path, revision):
            for tensor in map(file.get_slice, file.keys()):
                if dtype := _DTYPES.get(tensor.get_dtype()):
                    values[dtype] += math.prod(tensor.get_shape())
    return max(values, key=values.__getitem__, default=None)


def _weight_files(path: str | Path, revision: str | None) -> Iterator[Any]:
    """Yield the open safetensors files of a model, in a directory or from the hub."""
    from transformers.utils import cached_file

    find = partial(cached_file, _place(path), revision=revision)
    found = find(MODEL_FILE, _raise_exceptions_for_missing_entries=False)
    index = {} if found else json.loads(Path(find(f"{MODEL_FILE}.index.json")).read_bytes())["weight_map"]
    for name in sorted({*index.values()} or {MODEL_FILE}):
        with safe_open(find(name), framework="pt") as file:
            yield file


def _text_part(path: str | Path, revision: str | None) -> dict[str, Tensor]:
    """Return the tensors of a model's part for text, under the names that they have in a model of text alone."""
    tensors = {}
    for file in _weight_files(path, revision):
        for name in file.keys():  # noqa: SIM118 (no dict)
            if name.startswith("lm_head.") or _TEXT_PART.match(name):
                tensors[_TEXT_PART.sub("model.", name)] = file.get_tensor(name)
    return {name.replace("model.lm_head.", "lm_head."): tensor for name, tensor in tensors.items()}


def load_skeleton(path: str | Path, *, revision: str | None = None, kind: LoadedAs = CAUSAL_LM) -> nn.Module:
    """Return the model that load_model would return, without values: all its tensors are on torch's meta device."""
    from transformers import GenerationConfig

    with _reading(path):
        loader, config, attention, _ = _loader(path, revision, kind)
        with torch.device("meta"):
            model = loader.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
            )
        with suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(_place(path), revision=revision)
    return cast(nn.Module, model)


def check_tensors(
    path: str | Path, missing: Sequence[str], mismatched: Sequence[str], unexpected: Sequence[str]
) -> None:
    """Raise ModelUnsuitableError unless files hold the tensors of the model that their config.json describes."""
    faults = {"lack": missing, "hold in another shape": mismatched, "hold beside it": unexpected}
    said = "; ".join(f"{verb} {_listed(names)}" for verb, names in faults.items() if names)
    if said:
        raise ModelUnsuitableError(
            f"The files of {str(path)!r} are not those of the model in its config.json: they {said}. Nothing is made "
            "up and nothing is left out. Give a complete model of this architecture; if its head and its embedding "
            "are one matrix, its config.json must say tie_word_embeddings."
        )


def _of_a_head(model: nn.Module, name: str) -> bool:
    """Return True for a tensor of what lies behind the blocks: a head, or the pooler in front of one."""
    return not name.startswith(f"{cast(Any, model).base_model_prefix}.") or ".pooler." in name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more


def _loader(path: str | Path, revision: str | None, kind: LoadedAs, tells: bool = True) -> tuple[Any, Any, str, bool]:
    """Return the auto class, the configuration, the attention (torch's own, or else transformers' plain code), and
    True if it is the configuration of a model's part for text, beside which it has others.

    By then config.json is known to be of a model that the class can load.
    """
    import transformers
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    raw, _ = PreTrainedConfig.get_config_dict(_place(path), revision=revision)
    check_config(raw, path, kind)
    loader = getattr(transformers, kind.auto_class)
    config = AutoConfig.from_pretrained(_place(path), revision=revision, trust_remote_code=False)
    whole, config = config, config.get_text_config() if kind is CAUSAL_LM else config
    made = loader._model_mapping.get(type(config), None)
    if made is None:
        raise ModelUnsuitableError(
            f"{str(path)!r} is a model of type {whole.model_type!r}, of which transformers has no {kind.auto_class}. "
            "Give a model that was made for this objective."
        )
    made = made[0] if isinstance(made, tuple) else made
    if config is whole:
        check_config(raw, path, kind, made_as=made.__name__)
    elif tells:
        _LOGGER.warning(
            "Of %s, a model of type %r, only the part for text is trained and written, as a %s.",
            path, whole.model_type, made.__name__,
        )  # fmt: skip
    if made._supports_sdpa:
        return loader, config, "sdpa", config is not whole
    _LOGGER.info("%s attends by transformers' plain code ('eager'): it has no other for this model.", made.__name__)
    return loader, config, "eager", config is not whole


def _place(path: str | Path) -> str:
    """Return a directory of this machine, or the hub id that it must be."""
    return str(check_place(path) or path)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    check_place(path)
    try:
        yield
    except (OSError, ValueError, SafetensorError, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelNotFoundError(
            f"model.pretrained {str(path)!r} could not be loaded: {reason}. "
            "Give a directory with config.json and safetensors weights, or a hub id this machine can reach."
        ) from None
