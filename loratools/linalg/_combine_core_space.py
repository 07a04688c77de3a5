"""Core Space: TIES on small cores in bases that all adapters share.

"Accurate and Efficient Low-Rank Model Merging in Core Space", 2025, https://arxiv.org/abs/2509.17786.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.linalg._combine_ties import DENSITY, ties


def core_space(products: Sequence[tuple[Tensor, Tensor]], density: float = DENSITY) -> tuple[Tensor, Tensor]:
    """U_B M̄ V_Aᵀ, where M̄ is what TIES makes of the cores Mᵢ = U_BᵀBᵢAᵢV_A.

    U_B are the left singular vectors of [B₁ … B_T], V_A the right ones of [A₁; …; A_T]: BᵢAᵢ = U_B Mᵢ V_Aᵀ exactly. Any
    method can be applied to the cores; those that are linear, or look at singular values alone, give what they give
    outside. TIES does not, and depends on the bases, so on how BᵢAᵢ is shared between Bᵢ and Aᵢ: as in the paper
    they are taken as they come.

    Law: with density 1 and one product, that product.

    Args:
        products: (A (Rᵢ, n), B (m, Rᵢ)), any float dtype, finite; scalings and weights in Bᵢ.
        density: what TIES keeps of every core, in (0, 1].

    Returns:
        A (q, n) and B (m, q), float64, q = min(n, ΣRᵢ). Time O((m + n)·R² + R³), R = ΣRᵢ.
    """
    left = torch.linalg.svd(torch.cat([B.double() for _, B in products], 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat([A.double() for A, _ in products]), full_matrices=False)[2]
    cores = [(left.T @ B.double()) @ (A.double() @ right.T) for A, B in products]
    return right, left @ ties(cores, density)
