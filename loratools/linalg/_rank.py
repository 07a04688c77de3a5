"""From singular values to a rank: the rules, as functions of σ² alone."""

from __future__ import annotations

import math
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


def rank_for_ratio(sigma2_desc: Tensor, ratio: float) -> int:
    """How many singular values are at least σ_1/ratio.

    kohya's `sv_ratio` (sd-scripts, networks/resize_lora.py) counts σ_i > σ_1/ratio, and one more.

    Args:
        sigma2_desc: (k,) float64, descending; all of them, or the leading ones.
        ratio: at least 1.
    """
    if not sigma2_desc.numel() or not float(sigma2_desc[0]):
        return 0
    return int((sigma2_desc * (ratio * ratio) >= sigma2_desc[0]).sum())


def rank_for_fro(sigma2_desc: Tensor, total: float, share: float) -> int:
    """Least r with ‖M_r‖_F ≥ share·‖M‖_F: the rank for the energy share². kohya's `sv_fro` is one more."""
    return rank_for_energy(sigma2_desc, total, share * share)


def rank_for_cumulative(sigma2_desc: Tensor, share: float) -> int:
    """Least r with σ_1 + … + σ_r ≥ share·Σσ.

    kohya's `sv_cumulative` is one more.

    Args:
        sigma2_desc: (k,) float64, descending; all of them.
        share: in (0, 1].
    """
    sigma = sigma2_desc.sqrt()
    return rank_for_tail(sigma, float(sigma.sum()), 1.0 - share)


def rank_above(sigma2_desc: Tensor, floor: float) -> int:
    """How many singular values are larger than `floor`."""
    return int((sigma2_desc > floor * floor).sum())


def rank_at_knee(sigma2_desc: Tensor) -> int:
    """How many singular values come before the knee of the curve i ↦ σ_i.

    With both axes scaled to [0, 1], the knee is the point farthest from the chord between the first and the last
    (Satopää et al., "Finding a Kneedle in a haystack", 2011, without its smoothing and sensitivity). Below the chord it
    is the first of the small values and does not count; above it, the last of the large ones, and counts. A matrix of
    r equal singular values and zeros has knee r. ComfyUI-KJNodes' `sv_knee` takes the same point and counts it always.

    Args:
        sigma2_desc: (k,) float64, descending; all of them.

    Returns:
        At least 1 where anything is not zero; k for fewer than three values, or equal ones.
    """
    sigma = sigma2_desc.sqrt()
    count = sigma.numel()
    if not count or not float(sigma[0]):
        return 0
    spread = float(sigma[0] - sigma[-1])
    if count < 3 or spread <= math.sqrt(FLOAT32_FLOOR) * float(sigma[0]):  # noqa: PLR2004
        return count
    height = torch.linspace(0, 1, count, dtype=sigma.dtype, device=sigma.device) + (sigma - sigma[-1]) / spread - 1
    knee = int(height.abs().argmax())
    return max(knee + int(height[knee] > 0), 1)
