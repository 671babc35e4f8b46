"""Wrap the linear layers of a model as ReLoRA layers, and unwrap them."""

from collections.abc import Sequence

from torch import nn

from relora_train.errors import ModelError
from relora_train.method.layer import ReLoRALinear, relora_layers
from relora_train.method.merge import reinit
from relora_train.method.targets import check_targets, is_transposed


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
    "self_attn.q_proj"); None takes all linear layers inside the repeated blocks. Embeddings and the output head are
    never wrapped. `cycle` is the one about to start: a run resumed after cycle k draws with cycle = k + 1 what
    merge_and_reinit drew.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"rank = {rank} must be at least 1, alpha = {alpha} above 0 and dropout = {dropout} in [0, 1)")
    if any(True for _ in relora_layers(model)):
        raise ModelError("The model has ReLoRA layers already: call unwrap() on it before wrapping it again.")
    names = check_targets(model, target_modules, rank=rank)
    for name in names:
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
    reinit(model, seed=seed, cycle=cycle)
    return names


def unwrap(model: nn.Module) -> list[str]:
    """Make every wrapped layer the plain one it was, its weight trainable; return their names. Merge first.

    The model is then the ordinary model it was before apply_relora, with the same parameter names.
    """
    layers = dict(relora_layers(model))
    unmerged = [name for name, layer in layers.items() if layer.lora_B.count_nonzero() > 0]
    if unmerged:
        raise ModelError(
            f"{len(unmerged)} layers hold an update that was not merged, first {unmerged[0]}: call merge()."
        )
    for name, layer in layers.items():
        kind, attributes = layer.plain
        linear = kind.__new__(kind)
        nn.Module.__init__(linear)
        vars(linear).update(attributes)
        linear.weight = nn.Parameter(layer.weight.detach())
        linear.register_parameter("bias", layer.bias)
        model.set_submodule(name, linear.train(layer.training))
    return list(layers)
