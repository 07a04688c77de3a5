"""Iso-C: the sum with a flat spectrum ("No Task Left Behind", 2025, https://arxiv.org/abs/2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.linalg._core import qr_core
from loratools.linalg._joint import core_bases


def iso_c(products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """σ̄·U Vᵀ, where ΣBᵢAᵢ = U S Vᵀ and σ̄ is the mean of S.

    The paper takes the mean over all min(m, n) singular values, and flattens these too. Here the R that are not zero
    are meant (above 3e-7 of the largest): a sum of low rank has no directions beyond them, and an SVD of the dense
    matrix would make some up. Its σ̄ is R/min(m, n) times ours, for a dense matrix of full rank the same.

    Law: every singular value of the result is σ̄; the result is a function of ΣBᵢAᵢ alone.

    Args:
        products: (A (Rᵢ, n), B (m, Rᵢ)), any float dtype, finite.

    Returns:
        A (R, n) and B (m, R), float64. Time O((m + n)·R² + R³).
    """
    left, up, down, right = qr_core(
        torch.cat([A.double() for A, _ in products]), torch.cat([B.double() for _, B in products], 1)
    )
    U, S, V = core_bases(up @ down.T)
    return V.T @ right, left @ U * (float(S.mean()) if S.numel() else 0.0)
