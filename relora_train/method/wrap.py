"""Wrap the linear layers of a model as ReLoRA layers, and unwrap them."""

from collections.abc import Collection, Sequence

from torch import nn

from relora_train.errors import ModelError
from relora_train.method.experts import expert_layers, low_rank_layers, unwrap_experts, wrap_experts
from relora_train.method.layer import ReLoRALinear, lora_parameters, relora_layers
from relora_train.method.merge import reinit
from relora_train.method.targets import HEADS, check_targets, is_transposed


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
    frozen: Collection[str] = (),
) -> list[str]:
    """Wrap the target layers in place, leaving the model's function as it was; return their names in the model's order.

    The wrapped weights are frozen, and the kinds of `frozen` (parameter_kinds). `target_modules` are ends of module
    names, whole segments ("q_proj", "self_attn.q_proj"); None takes all linear layers inside the repeated blocks.
    Embeddings and the output head are never wrapped. `cycle` is the one about to start: a run resumed after cycle k
    draws with cycle = k + 1 what merge_and_reinit drew.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"rank = {rank} must be at least 1, alpha = {alpha} above 0 and dropout = {dropout} in [0, 1)")
    if any(True for _ in lora_parameters(model)):
        raise ModelError("The model has ReLoRA layers already: call unwrap() on it before wrapping it again.")
    names = check_targets(model, target_modules, rank=rank)
    for name in names:
        parent, _, own = name.rpartition(".")
        if own in (holder := model.get_submodule(parent))._parameters:
            wrap_experts(holder, own, rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
            continue
        linear = model.get_submodule(name)
        layer = ReLoRALinear(
            linear,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rank_stabilized=rank_stabilized,
            transposed=is_transposed(linear),
        )
        model.set_submodule(name, layer.train(linear.training))
    kinds = parameter_kinds(model)
    for name, parameter in model.named_parameters():
        if kinds[name] in frozen:
            parameter.requires_grad_(False)
    reinit(model, seed=seed, cycle=cycle)
    return names


def unwrap(model: nn.Module) -> list[str]:
    """Make every wrapped layer the plain one it was, everything trainable; return their names. Merge first.

    The model is then the ordinary model it was before apply_relora, with the same parameter names.
    """
    layers = low_rank_layers(model)
    unmerged = [name for name, layer in layers.items() if layer.lora_B.count_nonzero() > 0]
    if unmerged:
        raise ModelError(
            f"{len(unmerged)} layers hold an update that was not merged, first {unmerged[0]}: call merge()."
        )
    for name, layer in dict(relora_layers(model)).items():
        kind, attributes = layer.plain
        linear = kind.__new__(kind)
        nn.Module.__init__(linear)
        vars(linear).update(attributes)
        linear.weight = nn.Parameter(layer.weight.detach())
        linear.register_parameter("bias", layer.bias)
        model.set_submodule(name, linear.train(layer.training))
    unwrap_experts(model)
    model.requires_grad_(True)
    return list(layers)


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """Return the kind of each parameter by name: wrapped, factors, or one of settings.method.TrainConfig.

    A head that is the embedding's matrix is an embedding.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    kinds: dict[str, str] = {}
    experts: dict[str, list[str]] = {}
    for name, _, _ in expert_layers(model):
        experts.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    for path, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            if own in ("lora_A", "lora_B"):
                kind = "factors"
            elif (isinstance(module, ReLoRALinear) and own == "weight") or own in experts.get(path, ()):
                kind = "wrapped"
            elif module is head or path.rpartition(".")[2] in HEADS:
                kind = "head"
            elif "norm" in type(module).__name__.lower():
                kind = "norms"
            elif "embed" in path or isinstance(module, nn.Embedding):
                kind = "embeddings"
            else:
                kind = "biases" if own.endswith("bias") else "others"
            kinds[f"{path}.{own}" if path else own] = kind
    return kinds


def frozen_matrices(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Return the embeddings and linear layers without a low-rank update whose weights are frozen.

    Each comes with the names of its weight: an embedding that is the head too comes twice, with both names.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = [
        module
        for module in model.modules()
        if (isinstance(module, nn.Embedding | nn.Linear) or is_transposed(module)) and not module.weight.requires_grad
    ]
    return [(names[id(module.weight)], module) for module in found]
