"""Adam in a subspace of a matrix's gradients: GaLore (arXiv 2403.03507), and Fira (2410.01623), which adds the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from relora_train.distributed import send_from_first

GROWTH = 1.01
"""The norm of Fira's residual over that of the update before, at most."""


@dataclass(frozen=True)
class Subspace:
    """Adam on R = Pᵀ G, with P the first left singular vectors of a gradient, for the shorter side of a matrix.

    GaLore moves by scale · P ψ, where ψ is Adam's update of R. P is drawn anew at the first update and every
    refresh_steps after; the moments stay as they are, as published. Fira moves by scale · (P ψ + S'). S' is what P
    leaves of the gradient, S = G − P R, each column times |ψ| / |R| of its own column; its norm grows by GROWTH an
    update at most. Its authors' package also scales P R inside S, and agrees at scale 1.
    """

    rank: int
    refresh_steps: int
    scale: float
    residual: bool = False
    """True for Fira."""

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return step, subspace (short, rank), its moments (rank, long), and for Fira the norm of the last S'."""
        *experts, rows, columns = parameter.shape
        short, long = sorted((rows, columns))
        state = {"step": torch.zeros(()), "subspace": parameter.new_zeros(*experts, short, self.rank)}
        state |= {name: parameter.new_zeros(*experts, self.rank, long) for name in ("subspace_avg", "subspace_avg_sq")}
        return state | ({"residual_norm": parameter.new_zeros(*experts, 1, 1)} if self.residual else {})

    def direction(
        self, gradient: Tensor, state: dict[str, Tensor], *, betas: tuple[float, float], eps: float
    ) -> Tensor:
        """Return the update for a rate of 1. All ranks take the first one's subspace."""
        upright = gradient.shape[-2] > gradient.shape[-1]
        G = gradient.mT if upright else gradient  # (short, long)
        P, step = state["subspace"], int(state["step"])
        if (step - 1) % self.refresh_steps == 0:
            P.copy_(torch.linalg.svd(G, full_matrices=False).U[..., : self.rank])
            send_from_first(P)  # other processors round otherwise, and the ranks' weights would part
        R = P.mT @ G  # (rank, long)
        avg = state["subspace_avg"].lerp_(R, 1 - betas[0])
        avg_sq = state["subspace_avg_sq"].mul_(betas[1]).addcmul_(R, R, value=1 - betas[1])
        adam = (avg / (1 - betas[0] ** step)) / ((avg_sq / (1 - betas[1] ** step)).sqrt() + eps)
        update = P @ adam
        if self.residual:
            update += self._limited((G - P @ R) * (_lengths(adam) / _lengths(R).clamp_min(eps)), state["residual_norm"])
        update *= self.scale
        return update.mT if upright else update

    def _limited(self, residual: Tensor, before: Tensor) -> Tensor:
        """Return the residual, shortened to GROWTH times the norm before, which becomes its own."""
        norm: Tensor = torch.linalg.matrix_norm(residual, keepdim=True)
        longest = torch.where(before > 0, GROWTH * before, norm)  # no wait for the device
        before.copy_(torch.minimum(norm, longest))
        return residual * (before / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def _lengths(matrix: Tensor) -> Tensor:
    """Return the norm of each column."""
    lengths: Tensor = torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    return lengths
