"""The products of a ReLoRA layer: a rule that chooses them, and their FLOPs.

With N tokens, a weight (out, in), rank r, S = in + out and D = in * out, forward and backward together take

    split     4ND + 6NrS + 2Nr in    Wx + s B(Ax); dx through both paths; Ax made again for the gradient of B
    merged    4ND + 4NrS             (W + s BA)x; dx through the merged weight; 2rD more to merge, once an update
    dense     6ND                    merged, and the gradients of A and B from that of the merged weight; 4rD more

FLOPs, against 6ND at full rank.
"""

from collections.abc import Sequence
from typing import Literal

Products = Literal["split", "merged", "dense"]

_RANKS_LOST = {"cpu": 16}
_RANKS_LOST_ELSEWHERE = 360
"""A product whose short side is r takes as long as one of r + 16 at full speed on a CPU, of r + 360 on an H100."""

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that a transformers model calls one after the other with the very same tensor."""


def sibling_groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the module names, those that read the same input together, in the order of the first of each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        first = next((family[0] for family in SIBLINGS if own in family), own)
        groups.setdefault(f"{parent}.{first}", []).append(name)
    return [tuple(group) for group in groups.values()]


def choose_products(in_features: int, out_features: Sequence[int], rank: int, *, merges: bool, device: str) -> Products:
    """Return the fastest way for layers that share an input; a function of shapes, so a resumed run has the same bits.

    merges: a merged weight is right and there is room for it. With dropout, which acts on the low-rank path alone, the
    paths share no input. A merged weight in bfloat16 would lose the update to rounding.
    """
    if not merges:
        return "split"
    outs, ranks = sum(out_features), rank + _RANKS_LOST.get(device, _RANKS_LOST_ELSEWHERE)
    thin, dense = 4 * ranks * (in_features + outs), 2 * in_features * outs
    return "dense" if dense <= thin else "merged"


def flops_per_token(
    products: Products, in_features: int, out_features: Sequence[int], rank: int, *, tokens: int, micro_steps: int
) -> float:
    """Return the multiplications and additions of forward and backward over all the layers, divided by the tokens.

    tokens: of a forward pass, of which an update has micro_steps.
    """
    count, outs = len(out_features), sum(out_features)
    weights, sides = in_features * outs, count * in_features + outs
    if products == "split":
        return 4.0 * weights + 6.0 * rank * sides + 2.0 * rank * count * in_features
    merging = 2.0 * rank * weights / (tokens * micro_steps)
    if products == "merged":
        return 4.0 * weights + 4.0 * rank * sides + merging
    return 6.0 * weights + 4.0 * rank * weights / tokens + merging
