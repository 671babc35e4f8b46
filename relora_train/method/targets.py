"""Find the layers of a model that get a low-rank update: by default, all linear layers inside its repeated blocks."""

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from relora_train.errors import ConfigError, ModelError, NoTargetModulesError
from relora_train.method.experts import expert_parameters

HEADS = ("lm_head", "embed_out", "classifier", "score")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_targets(
    model: nn.Module, target_modules: Sequence[str] | None, *, rank: int, setting: str = "relora.rank"
) -> list[str]:
    """Return the names of the layers that apply_relora would wrap. The tensors may be on the meta device.

    None takes the linear layers and experts inside the repeated blocks, but no router, layer of one output, or shared
    weight. Experts that one module holds are named by their parameters.
    Raises NoTargetModulesError for a name without a layer, ModelError for a shared weight, and ConfigError for a rank
    above a side, which `setting` names.
    """
    weights = _wrappable(model)
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    shared = {name: held for name, weight in weights.items() if len(held := holders[id(weight)]) > 1}
    if target_modules is None:
        targets = [name for name in _inside_blocks(model, weights) if name not in shared]
        if not targets:
            raise _no_targets(f"A {type(model).__name__} has no repeated blocks with linear layers inside", weights)
    else:
        targets = _named(model, weights, target_modules)
    for name in targets:
        smaller = min(weights[name].shape[-2:])
        if rank > smaller:
            raise ConfigError(
                f"{setting} {rank} exceeds {smaller}, the smaller side of {name}. Lower {setting}"
                f"{', or leave the layer out of relora.target_modules' if setting == 'relora.rank' else ''}."
            )
        if name in shared:
            raise ModelError(
                f"The weight of {name} is shared ({', '.join(shared[name])}), so merging an update into it would "
                "change the other place too: leave it out of target_modules."
            )
    return targets


def is_transposed(module: nn.Module) -> bool:
    """Return True for the Conv1D of GPT-2, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and getattr(module.weight, "shape", None) == (module.nx, module.nf)


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the repeated blocks: the entries of each outermost list of modules that have parts."""
    found: list[str] = []
    for name, module in model.named_modules():
        stack = isinstance(module, nn.ModuleList) and all(any(True for _ in child.children()) for child in module)
        if stack and not is_inside(name, found):
            found += [f"{name}.{i}" for i, _ in enumerate(module.children())]
    return found


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Return True if the name is that of one of the modules or of a part of one."""
    parts = name.split(".")
    return not {".".join(parts[: i + 1]) for i in range(len(parts))}.isdisjoint(modules)


def _wrappable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the layers that compute W x + b, the output head left out, and those of experts, by name.

    A layer's name is its module's, that of experts their parameter's.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    found = {}
    for name, module in model.named_modules():
        if name and module is not head and name.rpartition(".")[2] not in HEADS and _is_linear(module):
            found[name] = module.get_parameter("weight")
        elif name:
            found |= {f"{name}.{own}": module.get_parameter(own) for own in expert_parameters(module)}
    return found


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or {*module._parameters} != {"weight", "bias"}:
        return False
    # A subclass of nn.Linear may hold its weight in another form (4-bit, 8-bit), or compute something else with it.
    plain = isinstance(module, nn.Linear) and weight.shape == (module.out_features, module.in_features)
    return is_transposed(module) or (plain and _multiplies_plainly(cast(Hashable, type(module))))


@cache
def _multiplies_plainly(kind: Hashable) -> bool:
    """Return True if this kind of nn.Linear computes what nn.Linear does, by a try with a small one."""
    probe = nn.Linear(3, 2, device="meta")  # no random number is drawn
    probe.weight = nn.Parameter(torch.arange(6, dtype=torch.float32, device="cpu").reshape(2, 3))
    probe.bias = nn.Parameter(torch.ones(2, device="cpu"))
    probe.__class__ = cast(type[nn.Linear], kind)
    x = torch.arange(12, dtype=torch.float32, device="cpu").reshape(2, 2, 3)
    try:
        return torch.equal(probe.forward(x), F.linear(x, probe.weight, probe.bias))
    except Exception:  # whatever a class raises that needs more than its weight and bias
        return False


def _inside_blocks(model: nn.Module, weights: dict[str, nn.Parameter]) -> list[str]:
    """Return the default targets, in the model's order."""
    blocks = block_names(model)
    config: Any = getattr(model, "config", None)
    counts = {getattr(config, key, None) for key in _EXPERT_COUNTS}
    found = []
    for name, weight in weights.items():
        parent, _, own = name.rpartition(".")
        beside = [child for child, _ in model.get_submodule(parent).named_children()]
        transposed = own in beside and is_transposed(model.get_submodule(name))
        outputs = weight.shape[1 if transposed else 0]
        near = (own, parent.rpartition(".")[2], *beside)
        routes = outputs in counts and any(word in each for each in near for word in ("gate", "router", "expert"))
        narrow = weight.ndim == 2 and (outputs == 1 or routes)
        # Inside a block, and not a block itself: a list of heads is no stack of blocks.
        if parent and is_inside(parent, blocks) and not narrow:
            found.append(name)
    return found


def _named(model: nn.Module, weights: dict[str, nn.Parameter], target_modules: Sequence[str]) -> list[str]:
    """Return the layers with these ends of names, whole segments, in the model's order."""
    suffixes = [target_modules] if isinstance(target_modules, str) else target_modules
    found = {suffix: [name for name in weights if f".{name}".endswith(f".{suffix}")] for suffix in suffixes}
    if not found or not all(found.values()):
        unfit = [f"{suffix!r} ({_why_not(model, suffix)})" for suffix in suffixes if not found[suffix]]
        raise _no_targets(f"relora.target_modules names {', '.join(unfit) or 'nothing'}", weights)
    return [name for name in weights if any(name in names for names in found.values())]


def _no_targets(what: str, weights: dict[str, nn.Parameter]) -> NoTargetModulesError:
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in weights})) or "(there are none)"
    return NoTargetModulesError(
        f"{what}. The linear layers that can be wrapped are called {kinds}: set relora.target_modules to some of these."
    )


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
