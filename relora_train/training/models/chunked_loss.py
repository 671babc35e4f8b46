"""From hidden states to the summed cross-entropy without all logits at once, the gradients made on the way.

A chunk of rows gives its logits, their share of the loss, and at once the gradients of its hidden states and of the
head; then the logits are gone. Torch's own `linear_cross_entropy` goes over the head's whole gradient for every 32 to
256 rows: on CPUs this is up to five times as fast (tests/benchmarks/RESULTS.md). Under bfloat16 torch's also sums the
loss in bfloat16, up to 9 % off over the chunks of a batch; here it is float32 on every device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relora_train.training.models.activations import added_classes, chunk_rows
from relora_train.training.models.documents import UNSCORED


def loss_of_rows(
    logits: Tensor, targets: Tensor, *, bias: bool, partial: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the summed cross-entropy of logits (rows, classes), its gradient in their dtype, and that of a bias.

    partial: a row whose target is UNSCORED has neither loss nor gradient; else there must be none.
    """
    logs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    picked = (targets.clamp_min(0) if partial else targets).unsqueeze(1)
    right = logs.gather(1, picked)
    if torch.compiler.is_compiling():  # one kernel; one that scatters would first write the probabilities in float32
        answers = torch.arange(logits.shape[1], device=logits.device) == picked
        gradient = torch.where(answers, logs.exp() - 1, logs.exp())
    else:
        gradient = logs.exp_()  # the probabilities, in place
        gradient.scatter_add_(1, picked, -torch.ones_like(right))
    if partial:
        unscored = (targets == UNSCORED).unsqueeze(1)
        right, gradient = right.masked_fill(unscored, 0), gradient.masked_fill_(unscored, 0)
    return -right.sum(), gradient.to(logits.dtype), gradient.sum(0) if bias else None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    of_rows: Callable[..., Any] = loss_of_rows,
    *,
    partial: bool = False,
) -> Tensor:
    """Return the sum over rows of the cross-entropy of `hidden @ weight.T + bias` in nats, differentiable once.

    hidden: (rows, in). weight: (classes, in) of the same dtype. targets: (rows,) classes. Products are in that dtype;
    the softmax, the loss and the sums over chunks are in float32. of_rows: loss_of_rows, or it compiled. partial: some
    targets may be UNSCORED.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        made: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, of_rows, partial)  # type: ignore[no-untyped-call]
    return made


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        of_rows: Callable[..., Any],
        partial: bool,
    ) -> Tensor:
        rows = chunk_rows(len(hidden), len(weight), hidden.device.type)
        classes, total = len(weight), torch.zeros((), device=hidden.device)
        ctx.bias_dtype, added = None if bias is None else bias.dtype, added_classes(classes, hidden.device.type)
        if added:  # of probability 0, so without loss and gradient
            bias = weight.new_zeros(classes) if bias is None else bias
            bias = torch.cat([bias, weight.new_full((added,), -torch.inf)])
            weight = torch.cat([weight, weight.new_zeros(added, weight.shape[1])])
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = None if ctx.bias_dtype is None else weight.new_zeros(len(weight), dtype=torch.float32)
        for x, answers, grad_x in zip(*(torch.split(t, rows) for t in (hidden, targets, grad_hidden)), strict=True):
            loss, gradient, of_bias = of_rows(
                F.linear(x, weight, bias), answers, bias=grad_bias is not None, partial=partial
            )
            total += loss
            if grad_bias is not None:
                grad_bias += of_bias
            torch.mm(gradient, weight, out=grad_x)
            if grad_weight is None:
                continue
            if weight.dtype == torch.float32:
                grad_weight.addmm_(gradient.T, x)
            else:
                grad_weight += gradient.T @ x
        grad_bias = None if grad_bias is None else grad_bias.narrow(0, 0, classes)
        if grad_weight is not None:
            grad_weight = grad_weight.narrow(0, 0, classes).to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        (scale,) = gradients
        bias = None if grad_bias is None else (grad_bias * scale).to(ctx.bias_dtype)
        head = None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype)
        return grad_hidden * scale.to(grad_hidden.dtype), head, bias, None, None, None
