"""All inner products of several low-rank matrices, none of which is formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.linalg._joint import joint_cores


def product_gram(products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """⟨BᵢAᵢ, BⱼAⱼ⟩ of every pair, through the cores that they have in joint bases. Time O((m + n)·R² + N·R³), R = ΣRᵢ.

    Law: symmetric; each entry is off by at most 1e-14·‖Bᵢ‖‖Aᵢ‖·‖Bⱼ‖‖Aⱼ‖.

    Args:
        products: N of (A (Rᵢ, n), B (m, Rᵢ)), any float dtype, finite.

    Returns:
        (N, N) float64.
    """
    flat = torch.stack([core.reshape(-1) for core in joint_cores(products)])
    return flat @ flat.T
