"""In which order a ReLoRA layer multiplies: a model of FLOPs and bytes, and the choice that follows. Pure. Light.

With N tokens, a weight (out, in), rank r, S = in + out and D = in * out, forward and backward together take

    split, low-rank      4ND + 6NrS    Wx + s B(Ax); dx through both paths; Ax made again for the gradient of B
    merged, low-rank     4ND + 4NrS    (W + s BA)x; dx through the merged weight; + 2rD to merge, once an update
    dense factors        + 2ND + 4rD   instead of 4NrS: the gradients of A and B from that of the merged weight

FLOPs, against 6ND at full rank. Products with one short side run below a processor's peak, and passes over memory are
not free, so the model counts time, not FLOPs alone. It is a function of shapes and the kind of device, never of a
clock: a run that is resumed makes the same choice and the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

Path = Literal["split", "merged"]
Factors = Literal["low_rank", "dense"]


@dataclass(frozen=True)
class Contraction:
    """An order of products for layers that share an input."""

    forward: Path
    """'split': Wx + s B(Ax); 'merged': (W + s BA)x."""

    backward: Path
    """The same for the gradient of x."""

    factors: Factors
    """'low_rank': gradients of A and B from thin products; 'dense': from the gradient of the merged weight."""

    @property
    def merges(self) -> bool:
        """Whether the merged weight is formed."""
        return "merged" in (self.forward, self.backward)

    def __str__(self) -> str:
        return f"forward {self.forward}, backward {self.backward}, factors {self.factors.replace('_', '-')}"


REFERENCE = Contraction("split", "split", "low_rank")
"""Right for every setting: with dropout, and for a weight in low precision."""


@dataclass(frozen=True)
class LayerShape:
    """Layers that read the same input, and how often."""

    tokens: int
    """Rows of the input in one forward pass."""

    in_features: int
    out_features: tuple[int, ...]
    """Of each of the layers."""

    rank: int
    dropout: bool = False
    exact_weight: bool = True
    """Held in float32 or float64. A merged weight in bfloat16 would lose the update to rounding."""

    micro_steps: int = 1
    """Forward passes an update: a merged weight is formed once for all of them."""


@dataclass(frozen=True)
class Machine:
    """What the model of time knows of a kind of device. Only ratios matter."""

    flops_per_byte: float
    """Floating-point operations a large product does while one byte moves."""

    half_speed_side: float
    """The shortest side at which a product runs at half of its peak."""


MACHINES = {
    "cpu": Machine(flops_per_byte=10, half_speed_side=12),
    "cuda": Machine(flops_per_byte=180, half_speed_side=16),
}
"""cpu: fp32, two AVX-512 cores (90 GF/s and 9 GB/s a core). cuda: bf16, H100 (550 TF/s and 3 TB/s)."""


SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that a transformers model calls one after the other with the very same tensor."""


def sibling_groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Module names, those that read the same input together; in the order of the first of each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        first = next((family[0] for family in SIBLINGS if own in family), own)
        groups.setdefault(f"{parent}.{first}", []).append(name)
    return [tuple(group) for group in groups.values()]


def candidates(shape: LayerShape, *, keep_merged: bool = True) -> list[Contraction]:
    """Every order that gives the right result for these layers; the reference first. keep_merged: as below."""
    if shape.dropout or not shape.exact_weight:
        # Dropout acts on the low-rank path alone, so that the two paths do not share an input.
        return [REFERENCE]
    paths: tuple[Path, ...] = ("split", "merged") if keep_merged else ("split",)
    kinds: tuple[Factors, ...] = ("low_rank", "dense")
    return [Contraction(forward, backward, factors) for forward, backward, factors in product(paths, paths, kinds)]


def choose_contraction(shape: LayerShape, device: str = "cpu", *, keep_merged: bool = True) -> Contraction:
    """The order that the model of time finds fastest; the simpler one of two that are level.

    device: 'cpu' or 'cuda'. keep_merged: whether memory allows to keep a merged weight for the length of an update.
    """
    orders = candidates(shape, keep_merged=keep_merged)
    return min(orders, key=lambda order: relative_time(order, shape, device))


def relative_time(order: Contraction, shape: LayerShape, device: str = "cpu") -> float:
    """Time of forward and backward, in units of a FLOP at peak."""
    machine = MACHINES.get(device, MACHINES["cuda"])
    tokens, d_in, rank = shape.tokens, shape.in_features, shape.rank
    joint = rank * len(shape.out_features)

    def matmul(m: int, k: int, n: int) -> float:
        share = min(m, k, n) / (min(m, k, n) + machine.half_speed_side)
        return max(2.0 * m * k * n / share, 4.0 * (m * k + k * n + m * n) * machine.flops_per_byte)

    passes = 4.0 * machine.flops_per_byte
    total = 0.0
    forms = order.merges / shape.micro_steps
    low_rank_forward = order.forward == "split"
    if low_rank_forward:
        total += matmul(tokens, d_in, joint)
    if order.factors == "low_rank":
        total += 2 * matmul(tokens, d_in, joint)  # Ax again, and the gradient of A
    if order.backward == "split":
        total += matmul(tokens, joint, d_in)
    for d_out in shape.out_features:
        total += 2 * matmul(tokens, d_in, d_out)
        total += forms * matmul(d_out, rank, d_in)
        if low_rank_forward:
            total += matmul(tokens, rank, d_out)
        if order.factors == "low_rank":
            total += 2 * matmul(tokens, d_out, rank)  # gB, and the gradient of B
        else:
            total += matmul(d_out, tokens, d_in) + 2 * matmul(d_out, d_in, rank)
            if order.backward == "split":
                total += matmul(tokens, d_out, rank)
        total += passes * tokens * d_out
    if shape.dropout:
        total += 2 * 3 * passes * tokens * d_in
    return total


def flops_per_token(order: Contraction, shape: LayerShape) -> float:
    """Multiplications and additions of forward and backward over all the layers, divided by the tokens."""
    outs, d_in, rank = sum(shape.out_features), shape.in_features, shape.rank
    count, weights = len(shape.out_features), d_in * sum(shape.out_features)
    forms = order.merges / shape.micro_steps
    flops = 4.0 * weights + forms * 2 * rank * weights / shape.tokens
    thin = 2.0 * rank
    flops += thin * (count * d_in + outs) * (order.forward == "split")
    if order.factors == "low_rank":
        flops += 2 * thin * (count * d_in + outs)
    else:
        flops += 2.0 * weights + 4.0 * rank * weights / shape.tokens
        flops += thin * outs * (order.backward == "split")
    return flops + thin * count * d_in * (order.backward == "split")
