"""TSV-M: singular vectors of several changes, made orthogonal to each other, then summed.

"Task Singular Vectors: Reducing Task Interference in Model Merging", 2024, https://arxiv.org/abs/2412.00081.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.linalg._core import qr_core
from loratools.linalg._joint import core_bases
from loratools.linalg._rank import FLOAT32_FLOOR


def tsv(products: Sequence[tuple[Tensor, Tensor]], tasks: int) -> tuple[Tensor, Tensor]:
    """Σ over all of Û diag(S) V̂ᵀ, where Û and V̂ are the nearest orthonormal matrices to [U₁ … U_T] and [V₁ … V_T].

    Of every BᵢAᵢ = Uᵢ Sᵢ Vᵢᵀ the leading ⌊min(m, n)/T⌋ triples take part, which for adapters is mostly all of them.
    The nearest orthonormal matrix is P Qᵀ for a singular value decomposition P D Qᵀ (Procrustes). Where vectors of
    different tasks depend on each other (D at the float32 floor), P and Q keep the directions that exist: tasks that
    are equal give that task's ΔW, where the published code would make directions up.

    Law: ΔWs whose row spaces and column spaces are orthogonal are summed as they are.

    Args:
        products: (A (Rᵢ, n), B (m, Rᵢ)), any float dtype, finite.
        tasks: T; at least as many as products, since a task may be zero.

    Returns:
        A (R, n) and B (m, R), float64, R ≤ ΣRᵢ. Time O((m + n)·R² + R³).
    """
    ranks = [A.shape[0] for A, _ in products]
    left, up, down, right = qr_core(
        torch.cat([A.double() for A, _ in products]), torch.cat([B.double() for _, B in products], 1)
    )
    most = min(left.shape[0], right.shape[1]) // tasks
    found = [
        core_bases(one @ other.T)
        for one, other in zip(torch.split(up, ranks, 1), torch.split(down, ranks, 1), strict=True)
    ]
    S = torch.cat([values[:most] for _, values, _ in found])
    U = _orthonormal(torch.cat([vectors[:, :most] for vectors, _, _ in found], 1))
    V = _orthonormal(torch.cat([vectors[:, :most] for _, _, vectors in found], 1))
    return V.T @ right, left @ U * S


def _orthonormal(tall: Tensor) -> Tensor:
    """The partial isometry of the polar decomposition."""
    P, D, Qt = torch.linalg.svd(tall, full_matrices=False)
    rank = int((math.sqrt(FLOAT32_FLOOR) * D.max() < D).sum()) if D.numel() else 0
    nearest: Tensor = P[:, :rank] @ Qt[:rank]
    return nearest
