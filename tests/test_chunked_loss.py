"""The loss in chunks: the same sum and the same gradients as over all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from relora_train.step import chunked_loss
from relora_train.step.chunked_loss import chunk_rows, chunked_cross_entropy

ROWS, WIDTH, CLASSES = 70, 16, 37


def _problem(dtype: torch.dtype, *, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH), *([torch.randn(CLASSES)] if bias else [])]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], torch.randint(CLASSES, (ROWS,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [ROWS, 32, 7])  # one chunk, a shorter last one, equal ones
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunks_change_neither_the_loss_nor_its_gradients(
    dtype: torch.dtype, tolerance: float, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "chunk_rows", lambda *sizes: rows)
    ours, targets = _problem(dtype, bias=bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    hidden, weight, *rest = ours
    loss = chunked_cross_entropy(hidden, weight, rest[0] if rest else None, targets)
    (loss / ROWS).backward()
    reference = F.cross_entropy(F.linear(exact[0], exact[1], *exact[2:]), targets, reduction="sum")
    (reference / ROWS).backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=tolerance)
    for tensor, right in zip(ours, exact, strict=True):
        assert tensor.grad is not None and right.grad is not None and tensor.grad.dtype == dtype
        assert (tensor.grad.double() - right.grad).norm() < tolerance * right.grad.norm()


def test_an_answer_of_hardly_any_probability_has_a_finite_loss() -> None:
    hidden, weight = torch.full((1, 1), 400.0, requires_grad=True), torch.tensor([[1.0], [0.0]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, None, torch.tensor([1]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 400.0
    assert hidden.grad is not None and float(hidden.grad) == 1.0


def test_chunks_are_bounded_by_their_logits_but_never_thin() -> None:
    assert chunk_rows(2048, 4096) == 2048
    assert chunk_rows(100_000, 32_000) == 524
    assert chunk_rows(100_000, 256_000) == 512
    assert chunk_rows(9, 32_000) == 9
