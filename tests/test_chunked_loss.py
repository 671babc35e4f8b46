"""The loss in chunks: the same sum and the same gradients as over all logits at once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from relora_train.training.models import chunked_loss
from relora_train.training.models.chunked_loss import chunk_rows, chunked_cross_entropy

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


def trained(
    rows: int, width: int, classes: int, *, certainty: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head and answers in bfloat16; the higher the certainty, the likelier the model finds them."""
    torch.manual_seed(1)
    weight, targets = torch.randn(classes, width) * 0.02, torch.randint(classes, (rows,))
    hidden = torch.randn(rows, width) + certainty * weight[targets] / (0.02**2 * width)
    return hidden.bfloat16(), weight.bfloat16(), targets


@pytest.mark.parametrize("certainty", [0.0, 5.0])
def test_under_bfloat16_the_loss_over_many_chunks_is_exact(certainty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in bfloat16 stands still once a chunk's share is below a 256th of it: 5 % off over these 64 chunks."""
    hidden, weight, targets = trained(8192, 64, 4000, certainty=certainty)
    monkeypatch.setattr(chunked_loss, "chunk_rows", lambda *sizes: 128)  # as torch takes on a GPU
    with torch.no_grad():
        exact = F.cross_entropy(F.linear(hidden.double(), weight.double()), targets, reduction="sum")
        found = chunked_cross_entropy(hidden, weight, None, targets)
    assert float(found) == pytest.approx(float(exact), rel=1e-4)


def test_on_a_gpu_the_loss_goes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is none: shapes and dtypes alone."""
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)  # torch's, which sums in bfloat16
    with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        hidden = torch.empty(8192, 64, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(32_000, 64, dtype=torch.bfloat16, device="cuda")
        loss = chunked_cross_entropy(hidden, weight, None, torch.empty(8192, dtype=torch.int64, device="cuda"))
        assert loss.device.type == "cuda" and loss.dtype == torch.float32


def test_chunks_are_bounded_by_their_logits_but_never_thin() -> None:
    assert chunk_rows(2048, 4096, "cpu") == 2048
    assert chunk_rows(100_000, 32_000, "cpu") == 524
    assert chunk_rows(100_000, 256_000, "cpu") == 512
    assert chunk_rows(9, 32_000, "cpu") == 9
    assert chunk_rows(100_000, 32_000, "cuda") == 4194
    assert chunk_rows(100_000, 256_000, "cuda") == 1024
