"""What the next Krylov block is worth before A is multiplied by it.

With Y = A·Vᵀ and AᵀY = Vᵀ·H + Zᵀ·Cᵀ, the space of Y is a better one for the left singular vectors than V is for the
right ones: it is a multiplication further. H = YᵀY = L·Lᵀ makes Q = L⁻¹Yᵀ its orthonormal rows, and
Q·A = [Lᵀ, L⁻¹·C]·[V; Z] is known without a product (the step of a block Golub-Kahan bidiagonalisation between two
of block Lanczos). Its singular values lie between those that H gives and those that the next H will give.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class HalfStep:
    """Q·A in terms of the basis.

    Attributes:
        L: (w, w) float64, lower triangular.
        last: (newest, c) float64, the rows of L⁻¹·C that are not zero.
    """

    L: Tensor
    last: Tensor

    def normal_matrix(self) -> Tensor:
        """(w, w), Q·A·Aᵀ·Qᵀ; its eigenvalues are squared singular values, from below."""
        found = self.L.T @ self.L
        newest = self.last.shape[0]
        found[-newest:, -newest:] += self.last @ self.last.T
        return found

    def chosen(self, rank: int) -> tuple[Tensor, Tensor]:
        """For the `rank` leading left vectors u: their coefficients in Yᵀ's rows (r, w), u·A's in [V; Z] (r, w + c)."""
        _, vectors = torch.linalg.eigh(self.normal_matrix())
        turned = vectors[:, vectors.shape[1] - rank :].flip(1).T
        beyond = turned[:, -self.last.shape[0] :] @ self.last
        coefficients = torch.linalg.solve_triangular(self.L, turned, upper=False, left=False)
        return coefficients, torch.cat([turned @ self.L.T, beyond], 1)


def half_step(H: Tensor, coupling: Tensor, newest: int) -> HalfStep | None:
    """The half step from H and the newest block's coupling, or None where Y has dependent columns.

    Args:
        H: (w, w) float64.
        coupling: (newest, c) float64; the rest of C is zero.
        newest: width of the newest block.
    """
    L, failed = torch.linalg.cholesky_ex(H)
    if int(failed) or not coupling.numel() or float(L.diagonal().min()) < _LEAST * float(L.diagonal().max()):
        return None
    return HalfStep(L, torch.linalg.solve_triangular(L[-newest:, -newest:], coupling, upper=False))


_LEAST = 1e-6  # singular values of A·Vᵀ below this fraction of the largest are rounding noise
