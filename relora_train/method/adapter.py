"""A and B of a model in the form of a PEFT adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from relora_train.distributed import full_tensor
from relora_train.errors import ModelError
from relora_train.method.layer import lora_parameters, relora_layers


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every A and B on the CPU, under the names that peft's adapter_model.safetensors uses."""
    return {
        f"base_model.model.{name}.weight": full_tensor(factor.detach()).to("cpu", copy=True)
        for name, factor in lora_parameters(model)
    }


def adapter_config(
    model: nn.Module, *, base_model_name_or_path: str | None = None, task_type: str | None = "CAUSAL_LM"
) -> dict[str, Any]:
    """Return the content of peft's adapter_config.json for adapter_state(model).

    It describes the low-rank updates alone: embeddings, norms, head and biases trained beside them are the base's.
    """
    layers = dict(relora_layers(model))
    if not layers:
        raise ModelError("The model has no ReLoRA layers, so it has no adapter.")
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rank_stabilized,
        "target_modules": list(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
