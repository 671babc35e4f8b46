"""The weights that stand for a model and the kind of each layer, from names and shapes alone."""

import re
from collections.abc import Iterable, Mapping, Sequence

_IN_A_BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<block>\d+)\.(?P<role>.+)\.weight")
_ATTENTION_ROLES = (
    ("q_proj", "query_key_value", "qkv_proj", "c_attn", "Wqkv", "query", "q_lin", "wq", "q"),
    ("v_proj", "value", "v_lin", "wv", "v"),
)
_MLP_ROLES = (
    ("up_proj", "gate_up_proj", "dense_h_to_4h", "fc1", "c_fc", "fc_in", "lin1", "wi_1", "wi", "intermediate.dense"),
    ("down_proj", "dense_4h_to_h", "fc2", "c_proj", "fc_out", "lin2", "wo", "output.dense"),
)


def block_matrices(names: Iterable[str]) -> tuple[str, ...]:
    """Return the weights that lie in a numbered block of layers, in the model's order; norms among them too."""
    return tuple(sorted((name for name in names if _IN_A_BLOCK.fullmatch(name)), key=natural_order))


def named_by(modules: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """Return the weights of modules whose name ends with one of these: "q_proj", "self_attn.q_proj"."""
    ends = tuple(f".{module}.weight" for module in modules)
    return tuple(sorted((name for name in names if f".{name}".endswith(ends)), key=natural_order))


def kind_of(name: str) -> str:
    """Return 'mlp.up_proj' for 'model.layers.3.mlp.up_proj.weight': the name of the same layer in every block."""
    return re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")


def block_of(name: str) -> str | None:
    """Return '3' for 'model.layers.3.mlp.up_proj.weight'; None outside numbered blocks."""
    match = re.search(r"\.(\d+)\.", name)
    return match[1] if match else None


def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key in which block 10 follows block 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def representative_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return a few weights that stand for a model: the same names always give the same choice.

    From the first, middle and last block of each stack: query, value (or the fused projection), MLP up and MLP down,
    by the names the common families use. A block of no known family gives its first four matrices by name.
    """
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in sorted(shapes):
        match = _IN_A_BLOCK.fullmatch(name)
        if match and len(shapes[name]) == 2:
            stacks.setdefault(match["stack"], {}).setdefault(int(match["block"]), {})[match["role"]] = name
    chosen: list[str] = []
    for _, blocks in sorted(stacks.items()):
        numbers = sorted(blocks)
        for number in sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}):
            roles = blocks[number]
            attention = [role for role in roles if "att" in role.lower()]
            mlp = [role for role in roles if role not in attention]
            found = [_first_ending(attention, endings) for endings in _ATTENTION_ROLES]
            found += [_first_ending(mlp, endings) for endings in _MLP_ROLES]
            known = [roles[role] for role in found if role is not None]
            chosen.extend(known or list(roles.values())[:4])
    return tuple(chosen)


def _first_ending(roles: list[str], endings: tuple[str, ...]) -> str | None:
    matches = (role for ending in endings for role in roles if f".{role}".endswith(f".{ending}"))
    return next(matches, None)
