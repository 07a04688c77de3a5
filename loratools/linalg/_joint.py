"""Several low-rank products in one pair of bases: their norms, products and subspaces, from small matrices alone.

With orthonormal bases Q of all B side by side and P of all Aᵀ side by side, every BᵢAᵢ = Q Mᵢ Pᵀ, and the cores Mᵢ have
the same norms, inner products and principal angles as the products themselves ("Core Space Merging for Model
Adaptation in Low-Rank Subspaces", 2025, https://arxiv.org/abs/2509.17786, does algebra there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.linalg._core import qr_core
from loratools.linalg._rank import FLOAT32_FLOOR


def joint_cores(products: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The core of every product BᵢAᵢ in bases that all of them share.

    Law: ⟨BᵢAᵢ, BⱼAⱼ⟩ = ⟨Mᵢ, Mⱼ⟩, and so for sums and differences; to 1e-15 of ‖BᵢAᵢ‖·‖BⱼAⱼ‖.

    Args:
        products: (A, B) of each, A (Rᵢ, n) and B (m, Rᵢ), any float dtype; finite.

    Returns:
        Matrices (min(m, ΣR), min(n, ΣR)), float64.
    """
    ranks = [A.shape[0] for A, _ in products]
    _, up, down, _ = qr_core(
        torch.cat([A.double() for A, _ in products]), torch.cat([B.double() for _, B in products], 1)
    )
    return [left @ right.T for left, right in zip(torch.split(up, ranks, 1), torch.split(down, ranks, 1), strict=True)]


def core_bases(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors, singular values and right singular vectors that are not at float32's floor.

    Returns:
        U (p, r), S (r,), V (q, r), float64; r = 0 for a zero matrix.
    """
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    rank = int(torch.count_nonzero(S / S[0] > math.sqrt(FLOAT32_FLOOR))) if S.numel() and float(S[0]) else 0
    return U[:, :rank], S[:rank], Vh[:rank].T


def principal_angles(one: Tensor, other: Tensor) -> list[float]:
    """The angles between two subspaces, in radians, ascending; as many as the smaller one has dimensions.

    Those below 45° from sines, the others from cosines, so that all are accurate (Björck and Golub, "Numerical methods
    for computing angles between linear subspaces", 1973).

    Args:
        one: (p, r), orthonormal columns, float64.
        other: (p, s), orthonormal columns, float64.
    """
    large, small = (one, other) if one.shape[1] >= other.shape[1] else (other, one)
    if not small.shape[1]:
        return []
    inner = large.T @ small
    cosines = torch.linalg.svdvals(inner).clamp_max(1.0)
    sines = torch.linalg.svdvals(small - large @ inner).flip(0).clamp_max(1.0)
    return [
        math.asin(sine) if cosine > math.sqrt(0.5) else math.acos(cosine)
        for cosine, sine in zip(cosines.tolist(), sines.tolist(), strict=True)
    ]
