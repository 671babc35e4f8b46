"""Wrap the linear layers of a model as ReLoRA layers, and unwrap them."""

from collections.abc import Sequence
from typing import cast

from torch import nn

from relora_train.errors import ConfigError, ModelError, NoTargetModulesError
from relora_train.method.layer import ReLoRALinear, relora_layers
from relora_train.method.merge import reinit

DEFAULT_TARGET_MODULES = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "vit": ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
}
"""The linear layers of attention and MLP, by the model_type of a transformers config."""

_HEADS = ("lm_head", "embed_out", "classifier")


def apply_relora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str] | None,
    seed: int,
    rank_stabilized: bool = False,
    cycle: int = 1,
) -> list[str]:
    """Wrap the target layers in place, leaving the model's function as it was; return their names in the model's order.

    Only the wrapped weights are frozen. `target_modules` are ends of module names, whole segments ("q_proj",
    "self_attn.q_proj"); None takes the layers of DEFAULT_TARGET_MODULES. Embeddings and the output head are never
    wrapped. `cycle` is the one about to start: a run resumed after cycle k draws with cycle = k + 1 what
    merge_and_reinit drew.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"rank = {rank} must be at least 1, alpha = {alpha} above 0 and dropout = {dropout} in [0, 1)")
    if any(True for _ in relora_layers(model)):
        raise ModelError("The model has ReLoRA layers already: call unwrap() on it before wrapping it again.")
    names = check_targets(model, target_modules, rank=rank)
    for name in names:
        linear = cast(nn.Linear, model.get_submodule(name))
        layer = ReLoRALinear(linear, rank=rank, alpha=alpha, dropout=dropout, rank_stabilized=rank_stabilized)
        model.set_submodule(name, layer.train(linear.training))
    reinit(model, seed=seed, cycle=cycle)
    return names


def check_targets(model: nn.Module, target_modules: Sequence[str] | None, *, rank: int) -> list[str]:
    """Return the names of the layers that apply_relora would wrap. The tensors may be on the meta device.

    Raises NoTargetModulesError for a name without a layer, ModelError for a shared weight, and ConfigError for a rank
    above a side.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    linears = {
        name: module
        for name, module in model.named_modules()
        # Not isinstance: a subclass of nn.Linear may hold its weight in another form (4-bit, 8-bit).
        if name and type(module) is nn.Linear and module is not head and name.rpartition(".")[2] not in _HEADS
    }
    family = getattr(getattr(model, "config", None), "model_type", None)
    given = [target_modules] if isinstance(target_modules, str) else target_modules
    suffixes = DEFAULT_TARGET_MODULES.get(str(family), ()) if given is None else given
    found = {suffix: [name for name in linears if f".{name}".endswith(f".{suffix}")] for suffix in suffixes}
    if not any(found.values()) or (given is not None and not all(found.values())):
        wanted = f"No target modules are known for the model type {family!r}"
        if given is not None:
            unfit = [f"{suffix!r} ({_why_not(model, suffix)})" for suffix in suffixes if not found[suffix]]
            wanted = f"relora.target_modules names {', '.join(unfit) or 'nothing'}"
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "(there are none)"
        raise NoTargetModulesError(
            f"{wanted}. The linear layers that can be wrapped are called {kinds}: set relora.target_modules to some of "
            "these."
        )
    targets = [name for name in linears if any(name in names for names in found.values())]
    for name in targets:
        linear = linears[name]
        smaller = min(linear.in_features, linear.out_features)
        if rank > smaller:
            raise ConfigError(
                f"relora.rank {rank} exceeds {smaller}, the smaller side of {name}. Lower relora.rank, or leave the "
                "layer out of relora.target_modules."
            )
        holders = [n for n, p in model.named_parameters(remove_duplicate=False) if p is linear.weight]
        if len(holders) > 1:
            raise ModelError(
                f"The weight of {name} is shared ({', '.join(holders)}), so merging an update into it would change the "
                "other place too: leave it out of target_modules."
            )
    return targets


def _why_not(model: nn.Module, suffix: str) -> str:
    """Return the reason why the module of this name cannot be wrapped."""
    module = next(
        (module for name, module in model.named_modules() if name and f".{name}".endswith(f".{suffix}")), None
    )
    if module is None:
        return "no module is called so"
    if isinstance(module, nn.Embedding):
        return "an embedding, which is trained in full"
    if type(module) is nn.Linear:
        return "the output head, which is trained in full"
    return f"no nn.Linear but a {type(module).__name__}"


def unwrap(model: nn.Module) -> list[str]:
    """Make every wrapped layer an nn.Linear again, its weight trainable; return their names. Merge first.

    The model is then the ordinary model it was before apply_relora, with the same parameter names.
    """
    layers = dict(relora_layers(model))
    unmerged = [name for name, layer in layers.items() if layer.lora_B.count_nonzero() > 0]
    if unmerged:
        raise ModelError(
            f"{len(unmerged)} layers hold an update that was not merged, first {unmerged[0]}: call merge()."
        )
    for name, layer in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.weight.detach())
        if layer.bias is not None:
            linear.bias = layer.bias
        model.set_submodule(name, linear.train(layer.training))
    return list(layers)
