"""From singular values to a rank: the rules, as functions of σ² alone."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FLOAT32_FLOOR: Final = 1e-13
"""Residual²/‖M‖² below which a float32 matrix is represented exactly: (3e-7)²."""


def tails(sigma2_desc: Tensor, total: float) -> Tensor:
    """Residual² of every truncation.

    Args:
        sigma2_desc: (k,) float64, squared singular values, descending; all of them or the leading ones.
        total: ‖M‖_F².

    Returns:
        (k + 1,) float64: entry r is ‖M − M_r‖², summed from the small end so that it does not cancel.
    """
    rest = max(total - float(sigma2_desc.sum()), 0.0)
    behind = sigma2_desc.flip(0).cumsum(0).flip(0)
    return torch.cat([behind, behind.new_zeros(1)]) + rest


def rank_for_tail(sigma2_desc: Tensor, total: float, tail: float) -> int:
    """Least r with residual² ≤ tail·total (plus the float32 floor); the number of values where none is."""
    enough = (tails(sigma2_desc, total) <= (tail + FLOAT32_FLOOR) * total).nonzero()
    return int(enough[0]) if enough.numel() else sigma2_desc.numel()


def rank_for_energy(sigma2_desc: Tensor, total: float, energy: float) -> int:
    """Least r whose leading σ² sum to at least energy·total.

    Args:
        sigma2_desc: (k,) float64, descending.
        total: ‖M‖_F².
        energy: in (0, 1]; 1 means everything above the float32 floor.

    Returns:
        The rank; k where no prefix is enough.
    """
    return rank_for_tail(sigma2_desc, total, 1.0 - energy)


def rank_for_error(sigma2_desc: Tensor, total: float, error: float) -> int:
    """Least r with ‖M − M_r‖_F ≤ error·‖M‖_F; k where no prefix is enough. Arguments as in `rank_for_energy`."""
    return rank_for_tail(sigma2_desc, total, error * error)
