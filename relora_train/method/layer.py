"""The layer: a frozen weight with a trained low-rank update, y = W x + b + scaling * B (A (dropout(x))).

Source: arXiv 2307.05695. All functions of this room take the bare model, not one wrapped by DDP or torch.compile: the
names of its modules decide what is drawn and what is written. If a model is sharded by rows over ranks, all ranks call
together. A frozen weight may be held in
fewer bytes (frozen.py).
"""

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_train.distributed import local_shard
from relora_train.method.frozen import KINDS, Frozen, dequantize, quantize
from relora_train.method.graph_path import linears_in_graph, low_rank_scale


class ReLoRALinear(nn.Module):
    """A linear layer whose weight is frozen and whose bias and low-rank update are trained.

    weight (out, in), or (in, out) if it is transposed; lora_A (rank, in), lora_B (out, rank). The factors begin as
    float32, or float64 beside a float64 weight, whatever lower precision the weight is held in. The scaling is a
    constant: a trained one would be multiplied by B = 0 after a merge, and once at zero itself would never leave it. A
    new layer has B = 0 and A undrawn.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        rank_stabilized: bool,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        weight = linear.get_parameter("weight")
        self.transposed = transposed
        self.in_features, self.out_features = weight.shape if transposed else (weight.shape[1], weight.shape[0])
        self.rank, self.alpha, self.dropout, self.rank_stabilized = rank, alpha, dropout, rank_stabilized
        self.scaling = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.register_parameter("bias", linear._parameters["bias"])
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self.scales: Tensor | None
        self.register_buffer("scales", None, persistent=False)
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=dtype))
        self.plain = type(linear), {key: value for key, value in vars(linear).items() if not key.startswith("_")}
        """Class and attributes of the layer that was wrapped, for unwrap()."""

        self.shared: Callable[[ReLoRALinear, Tensor], Tensor] | None = None
        """Computes this layer together with those that read the same input (fast_path.py); None: as relora_linear."""

        self.mask_seed: Tensor | None = None
        """Two int32 numbers from which dropout's mask is hashed (graph_path.py); None: torch's generator draws it."""

        self.siblings: tuple[ReLoRALinear, ...] = ()
        """The others that read the same input: within a graph, the first that is called computes all of them."""

        self._made: tuple[Tensor, Tensor] | None = None  # an input, and the output that a sibling made of it

    @property
    def matrix(self) -> Tensor:
        """The weight as (out, in), or its codes."""
        return self.weight.T if self.transposed and self.scales is None else self.weight

    def hold(self, exact: Tensor, kind: Frozen | None = None) -> None:
        """Hold the exact weight, or a rank's rows of it, as this kind, or as the weight is held now.

        If `scales` has scales then, `weight` has the codes of the matrix (out, in).
        """
        kind = kind or (None if self.scales is None else KINDS[self.weight.dtype])
        if kind is None:
            local_shard(self.weight).copy_(exact)
            return
        codes, scales = self.rounded(exact, kind)
        self.weight = nn.Parameter(codes.to(self.weight.device), requires_grad=False)
        self.scales = None if scales is None else scales.to(self.weight.device)

    def rounded(self, exact: Tensor, kind: Frozen) -> tuple[Tensor, Tensor | None]:
        """Return what the layer would hold of the exact weight, and its scales."""
        return quantize(exact.T if self.transposed and kind in KINDS.values() else exact, kind)

    def frozen_matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) as the layer holds it, in this dtype."""
        return dequantize(self.matrix, self.scales, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        # Under compile, plain operations: dynamo breaks 36 times in two layers of the fast path with dropout.
        if torch.compiler.is_compiling() and (dropout == 0 or self.mask_seed is not None):
            return self._in_graph(x, dropout)
        if self.shared is not None and not torch.compiler.is_compiling():
            return self.shared(self, x)
        return relora_linear(x, self._computed_matrix(x), self.bias, self.lora_A, self.lora_B, self.scaling, dropout)

    def _computed_matrix(self, x: Tensor) -> Tensor:
        if self.scales is None:
            return self.matrix
        autocast = torch.is_autocast_enabled(x.device.type)
        return self.frozen_matrix(torch.get_autocast_dtype(x.device.type) if autocast else self.lora_A.dtype)

    def _in_graph(self, x: Tensor, dropout: float) -> Tensor:
        made, self._made = self._made, None
        if made is not None and made[0] is x:
            return made[1]
        layers = (self, *self.siblings)
        factors = [(each._computed_matrix(x), each.bias, each.lora_A, each.lora_B) for each in layers]
        scale = low_rank_scale(self.scaling, dropout)
        output, *others = linears_in_graph(x, factors, scale, self.mask_seed, dropout)
        for sibling, y in zip(self.siblings, others, strict=True):
            sibling._made = x, y
        return output

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
        )


def relora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    """Return W x + b + scaling * B (A (dropout(x))) in the dtype of nn.Linear; x (..., in) -> (..., out)."""
    low_rank_input = F.dropout(x, dropout) if dropout > 0 else x
    low_rank = _linear(_linear(low_rank_input, lora_A), lora_B)  # (..., rank) -> (..., out)
    return torch.add(_linear(x, weight, bias), low_rank, alpha=scaling)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for a weight held in another dtype than x; under autocast, autocast decides."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def relora_layers(model: nn.Module) -> Iterator[tuple[str, ReLoRALinear]]:
    """Yield every wrapped layer with its module name, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, ReLoRALinear):
            yield name, module


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every A and B with its parameter name (as in model.named_parameters()), in the model's order."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("lora_A", "lora_B"):
            yield name, parameter


def stable_generator(seed: int, cycle: int, name: str) -> torch.Generator:
    """Return a CPU generator that is the same on every rank, device and resume; no global random state is touched."""
    digest = hashlib.sha256(f"{seed}/{cycle}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
