"""A drawn from the gradient: the directions of the input in which W's gradient is largest, at the start of a cycle.

With B = 0 the first update of B sees the gradient of W through A alone, G Aᵀ. A Kaiming A catches a random rank / in of
it; the top right singular vectors of G catch the most that this rank can. The model's function stays as it was. G is
that of the cycle's first batch, a function of the seed and the step. It is never formed: two passes over the batch sum
its products with thin matrices (randomized SVD with one power step, arXiv 0909.4061), for all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora_train.distributed import Ranks, local, part_of
from relora_train.errors import DivergedError
from relora_train.method.relora import ReLoRALinear, relora_layers, stable_generator

_OVERSAMPLING = 8
"""Directions that are looked for beside those that are kept: what randomized SVD needs to find the latter well."""

Observe = Callable[[str, Tensor, Tensor], None]
"""Given a layer's name, the rows of its input (tokens, in) and the gradient of its output (tokens, out), in float32."""


@dataclass
class _Sketch:
    """Sums over the batch of one layer."""

    test: Tensor
    """(out, k) in the first pass: random; (in, k) in the second: an orthonormal basis of what the first found."""
    total: Tensor
    """Gᵀ test (in, k), then G test (out, k)."""


def gradient_init(
    model: nn.Module, pass_over_batch: Callable[[], None], *, ranks: Ranks, seed: int, cycle: int
) -> None:
    """Set every A to the top right singular vectors of its weight's gradient, as large as a Kaiming A on average.

    pass_over_batch: forward and backward over this rank's share of a batch, the loss as in training; gradients that it
    leaves are dropped. B must be zero and stays so. The same on every rank. Each row has norm 1/sqrt(3), a Kaiming
    row's root mean square. Raises DivergedError for a gradient that is not finite.
    """
    layers = dict(relora_layers(model))
    sketches = {name: _random_sketch(layer, name, seed=seed, cycle=cycle) for name, layer in layers.items()}
    with _observed(layers, _add_rows(sketches)):
        pass_over_batch()
    for name, sketch in sketches.items():
        found = _summed(name, sketch, ranks)
        basis = torch.linalg.qr(found).Q  # (in, k)
        sketches[name] = _Sketch(basis, basis.new_zeros(layers[name].out_features, basis.shape[1]))
    with _observed(layers, _add_columns(sketches)):
        pass_over_batch()
    for name, layer in layers.items():
        right = _right_vectors(_summed(name, sketches[name], ranks), sketches[name].test, layer.rank)
        _set(layer, right / 3**0.5, ranks)
    for parameter in model.parameters():
        parameter.grad = None


def _random_sketch(layer: ReLoRALinear, name: str, *, seed: int, cycle: int) -> _Sketch:
    width = min(layer.rank + _OVERSAMPLING, layer.in_features, layer.out_features)
    generator = stable_generator(seed, cycle, f"{name}.gradient")
    test = torch.randn(layer.out_features, width, generator=generator).to(layer.weight.device)
    return _Sketch(test, test.new_zeros(layer.in_features, width))


def _add_rows(sketches: dict[str, _Sketch]) -> Observe:
    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        sketch = sketches[name]
        sketch.total += x.T @ (gradient @ sketch.test)  # Gᵀ test, with G = gradientᵀ x

    return add


def _add_columns(sketches: dict[str, _Sketch]) -> Observe:
    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        sketch = sketches[name]
        sketch.total += gradient.T @ (x @ sketch.test)  # G test

    return add


@contextmanager
def _observed(layers: dict[str, ReLoRALinear], observe: Observe) -> Iterator[None]:
    """Show each layer's input with the gradient of its output, as soon as a backward pass has it."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = inputs[0].detach()

                def look(gradient: Tensor) -> None:
                    with torch.no_grad():
                        observe(name, x.flatten(0, -2).float(), gradient.detach().flatten(0, -2).float())

                output.register_hook(look)  # type: ignore[no-untyped-call]

        return hook

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _summed(name: str, sketch: _Sketch, ranks: Ranks) -> Tensor:
    total = ranks.sum(sketch.total)
    if not bool(total.isfinite().all()):
        raise DivergedError(
            f"The gradient of {name}.weight is not finite at the start of the cycle: the run diverged, and nothing of "
            "this stage was committed. Lower optimizer.learning_rate."
        )
    return total


def _right_vectors(columns: Tensor, basis: Tensor, rank: int) -> Tensor:
    """(rank, in), orthonormal rows, the strongest first. columns: G basis (out, k), basis (in, k)."""
    core = torch.linalg.svd(columns.double(), full_matrices=False).Vh  # (k, k)
    right = core[:rank] @ basis.double().T
    # Of v and −v the one whose largest entry is positive: libraries differ in which they return.
    largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
    upright: Tensor = right * torch.where(largest < 0, -1.0, 1.0)
    return upright.float()


@torch.no_grad()
def _set(layer: ReLoRALinear, A: Tensor, ranks: Ranks) -> None:
    """The first rank's on all: equal sums could still give a decomposition that differs in its last bits."""
    shared = ranks.sum(A.contiguous() if ranks.is_first else torch.zeros_like(A))
    local(layer.lora_A).copy_(part_of(shared, layer.lora_A))
