"""The low-rank update of a stage in PEFT's form: as a checkpoint records it, and as an adapter for use.

The adapter/ of a checkpoint holds A and B alone. An exported adapter is right on the model that the stage began from,
because everything else that the stage trained goes with it: PEFT's `modules_to_save` are whole modules (embeddings,
norms, head), `bias` the biases of wrapped layers.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from relora_train.distributed import full_tensor
from relora_train.errors import ModelError
from relora_train.method.experts import low_rank_layers
from relora_train.method.layer import relora_layers
from relora_train.method.targets import is_transposed
from relora_train.settings.profile import profile_to_read
from relora_train.training.files import ADAPTER_DIRECTORY
from relora_train.training.models.registry import objective_of

_PREFIX = "base_model.model."
_ROUNDING = 1e-4  # of the largest weight: float32 summed in another order; bfloat16 rounds by 4e-3
_EXPERT_NAMES = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
_RECORD_README = """\
# The low-rank update that this stage merged

A record of what the stage learned, for `relora analyze`: A and B of each wrapped layer, in PEFT's format. Do not load
it into a model to use it:

- The checkpoint in the directory above has the update in its weights already; there it would count twice.
- The checkpoint that the stage began from lacks what was trained beside A and B: embeddings, norms, biases and head.
  `base_model_name_or_path` in adapter_config.json, and `parent` in manifest.json, name that checkpoint.

`relora export CHECKPOINT DIR --as-adapter` writes an adapter that is right on the checkpoint the stage began from.
"""
_README = """\
# A PEFT adapter of one low-rank stage

It belongs on {base} and on no other model: there its logits are those of {checkpoint}. With PEFT:

    PeftModel.from_pretrained(MODEL_LOADED_FROM_THE_BASE, "this directory")

It holds the stage's low-rank updates, and as `modules_to_save` and biases what the stage trained beside them.
"""


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every A and B on the CPU, under the names that peft's adapter_model.safetensors uses.

    Those of experts, (experts, …), have names without ".weight", which peft does not know.
    """
    return {
        f"{_PREFIX}{name}.lora_{factor}" + (".weight" if value.ndim == 2 else ""): full_tensor(value.detach()).to(
            "cpu", copy=True
        )
        for name, layer in low_rank_layers(model).items()
        for factor, value in (("A", layer.lora_A), ("B", layer.lora_B))
    }


def adapter_config(
    model: nn.Module, *, base_model_name_or_path: str | None = None, task_type: str | None = "CAUSAL_LM"
) -> dict[str, Any]:
    """Return the content of peft's adapter_config.json for adapter_state(model).

    It describes the low-rank updates alone: embeddings, norms, head and biases trained beside them are the base's.
    """
    layers = low_rank_layers(model)
    if not layers:
        raise ModelError("The model has no ReLoRA layers, so it has no adapter.")
    linears, first = dict(relora_layers(model)), next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rank_stabilized,
        "target_modules": list(linears),
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in linears.values()),
        "inference_mode": True,
    }


def save_adapter(tensors: Mapping[str, Tensor], config: Mapping[str, Any], directory: Path) -> None:
    """Write A and B as a PEFT adapter in a directory of its own, with a README that says what it is not for."""
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (directory / "README.md").write_text(_RECORD_README)


def write_adapter(checkpoint: Path, base: Path, directory: Path, *, base_name: str, checkpoint_name: str) -> None:
    """Write adapter_model.safetensors, adapter_config.json and a README.md for the checkpoint's stage on its base.

    Both models are loaded, in float32, in this process. Raises ModelError where the checkpoint's weights are not the
    base's plus the update: then no adapter can stand for it.
    """
    objective = objective_of(profile_to_read((checkpoint / "profile.json").read_bytes()))
    model = objective.load_model(checkpoint)
    origin = objective.load_base(base, model)
    updates = load_file(checkpoint / ADAPTER_DIRECTORY / "adapter_model.safetensors")
    config = json.loads((checkpoint / ADAPTER_DIRECTORY / "adapter_config.json").read_bytes())
    tensors, changes = adapter_on_base(model, origin, updates, config)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config |= {**changes, "base_model_name_or_path": base_name}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (directory / "README.md").write_text(_README.format(base=base_name, checkpoint=checkpoint_name))


@torch.no_grad()
def adapter_on_base(
    model: nn.Module, base: nn.Module, updates: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under PEFT's names, and the keys of PEFT's configuration that depend on them.

    updates, config: of the stage's adapter/. Layers that PEFT would take for experts, and those whose weight is not the
    base's plus the update, are given whole.
    """
    ours, theirs = model.state_dict(), base.state_dict()
    ends = (".lora_A.weight", ".lora_B.weight")
    layers = [name.removeprefix(_PREFIX).removesuffix(ends[0]) for name in updates if name.endswith(ends[0])]
    added = set()
    for name in layers:
        A, B = (updates[f"{_PREFIX}{name}{end}"] for end in ends)
        alpha = config.get("alpha_pattern", {}).get(name, config["lora_alpha"])
        scaling = alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
        weight, before = ours[f"{name}.weight"], theirs.get(f"{name}.weight")
        if before is not None and before.shape == weight.shape:
            left, right = (A.T, B.T) if is_transposed(model.get_submodule(name)) else (B, A)
            error = torch.addmm(before, left, right, alpha=scaling).sub_(weight).abs_().max()
            if error <= _ROUNDING * weight.abs().max():
                added.add(name)
    if not added:
        raise ModelError(
            "The weights of this checkpoint are not those it began from plus its low-rank update: they were rounded "
            "(relora.merge_dtype), or the model it began from has changed. Export it whole, without --as-adapter."
        )
    # In a mixture of experts, PEFT 0.21 takes names such as up_proj for parameters of its experts.
    experts = any("expert" in key and value for key, value in cast(Any, model).config.to_dict().items())
    low_rank = {name for name in added if not (experts and name.rpartition(".")[2] in _EXPERT_NAMES)}
    changed = {
        module
        for module, name in ((key.rpartition(".")[0], key) for key in ours)
        if module not in low_rank and not (name in theirs and torch.equal(ours[name], theirs[name]))
    }
    if "" in (names := changed | (set(layers) - low_rank)):
        raise ModelError(
            f"A {type(model).__name__} has trained values of its own, outside its modules, which PEFT cannot hold. "
            "Export the checkpoint whole, without --as-adapter."
        )
    # PEFT takes names for ends of names, and saves every module that matches; none inside another is needed.
    matched = {n for n, _ in model.named_modules(remove_duplicate=False) if names and n.endswith(tuple(names))}
    whole = {name for name in matched if not _is_inside(name, matched - {name})}
    low_rank = {name for name in low_rank if not _is_inside(name, whole)}
    if not low_rank:
        raise ModelError(
            "PEFT 0.21 takes every layer with an update here for a part of experts, so none can be a low-rank one. "
            "Export the checkpoint whole, without --as-adapter."
        )
    factors = [f"{_PREFIX}{name}{end}" for name in low_rank for end in ends]
    tensors = {name: updates[name] for name in factors}
    biases = {f"{name}.base_layer.bias": ours[f"{name}.bias"] for name in low_rank if f"{name}.bias" in ours}
    saved = {f"{name}.{key}": v for name in whole for key, v in model.get_submodule(name).state_dict().items()}
    tensors |= {f"{_PREFIX}{name}": tensor.contiguous().clone() for name, tensor in {**biases, **saved}.items()}
    patterns: dict[str, Any] = {
        key: {name: value for name, value in config[key].items() if name in low_rank}
        for key in ("rank_pattern", "alpha_pattern")
        if key in config
    }
    changes = {
        **patterns,
        "target_modules": [name for name in layers if name in low_rank],
        "modules_to_save": sorted(whole) or None,
        "bias": "lora_only" if biases else "none",
    }
    return tensors, changes


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    """Return True if it is one of the modules or a part of one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
