"""KnOTS: TIES in the basis that a joint SVD gives ("Model merging with SVD to tie the Knots", 2024).

https://arxiv.org/abs/2410.19735
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.linalg._combine_ties import DENSITY, disjoint_mean, trimmed
from loratools.linalg._joint import core_bases


def knots(products: Sequence[tuple[Tensor, Tensor]], density: float = DENSITY) -> tuple[Tensor, Tensor]:
    """U Σ V̄, where [B₁A₁ … B_TA_T] = U Σ [V₁ … V_T] and V̄ is what TIES makes of the Vᵢ (KnOTS-TIES).

    The Vᵢ are trimmed as they are, each on its own; Σ is put on before the average. The joint matrix m × T·n is never
    formed: its left basis is that of the Bᵢ, and the rest goes through triangular factors of the Aᵢ.

    Law: of one product with density 1, that product; the result depends on the BᵢAᵢ alone where Σ has no equal values.

    Args:
        products: (A (Rᵢ, n), B (m, Rᵢ)), any float dtype, finite.
        density: what TIES keeps of every Vᵢ, in (0, 1].

    Returns:
        A (R, n) and B (m, R), float64, R ≤ ΣRᵢ: the rank of the joint matrix. Time O((m + T·n)·R² + R³).
    """
    ranks = [A.shape[0] for A, _ in products]
    left, right = torch.linalg.qr(torch.cat([B.double() for _, B in products], 1))
    rows, lowers = zip(*(_lq(A.double()) for A, _ in products), strict=True)
    core = torch.cat([up @ low for up, low in zip(torch.split(right, ranks, 1), lowers, strict=True)], 1)
    U, S, W = core_bases(core)
    if not S.numel():
        return products[0][0].double()[:0], left[:, :0]
    sizes = [low.shape[1] for low in lowers]
    parts = [trimmed(part.T @ row, density) for part, row in zip(torch.split(W, sizes, 0), rows, strict=True)]
    return S[:, None] * disjoint_mean(parts), left @ U


def _lq(A: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q (q, n) and L (R, q) with A = L Q."""
    Q, upper = torch.linalg.qr(A.T)
    return Q.T, upper.T
