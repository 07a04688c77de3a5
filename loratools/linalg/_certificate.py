"""How far from the best: what a Krylov basis says about the part of the matrix that it has not seen.

In the basis [V, V⊥] the matrix AᵀA is [[H, C], [Cᵀ, D]]. With the next Krylov block at hand C is known, and for any
mu ≥ ‖D‖ the eigenvalues of AᵀA are at most those of [[H, E], [Eᵀ, mu·I]]. The bound is as good as mu: here mu is
estimated from the newest block, which makes it a heuristic (no violation seen on 59 measured checkpoints).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SAFETY = 1.5  # the newest block's largest Ritz value is 0.6 to 1.0 of ‖D‖
_AITKEN_FROM = 4
_AITKEN_FACTOR = 2.5


def energy_bound(H: Tensor, coupling: Tensor, newest: int, rank: int) -> float:
    """Upper estimate of the energy that the best rank-`rank` approximation captures.

    Args:
        H: (w, w) float64, VᵀAᵀAV, the newest block last.
        coupling: (newest, c) float64, the block of C that belongs to the newest block; the rest of C is zero.
        newest: width of the newest block.
        rank: of the approximation; directions beyond the bordered matrix count mu each.
    """
    width, extra = H.shape[0], coupling.shape[1]
    mu: float = _SAFETY * float(torch.linalg.eigvalsh(H[width - newest :, width - newest :])[-1])
    bordered = torch.zeros((width + extra, width + extra), dtype=torch.float64)
    bordered[:width, :width] = H
    bordered[width - newest : width, width:] = coupling
    bordered[width:, width - newest : width] = coupling.T
    bordered[width:, width:].fill_diagonal_(mu)
    values: Tensor = torch.linalg.eigvalsh(bordered).flip(0)[:rank].clamp_min(0)
    return float(values.sum()) + mu * max(rank - values.numel(), 0)


def gap(total: float, captured: float, best: float) -> float:
    """residual/optimum − 1 if no approximation captures more than `best`; infinite where that says nothing."""
    if best >= total:
        return math.inf
    return math.sqrt(max(total - captured, 0.0) / (total - best)) - 1.0


def estimated_gap(total: float, captured: list[float], blocks: int, best: float) -> float:
    """The smallest of three estimates of residual/optimum − 1; what the stopping rule looks at.

    The bordered matrix; the gap-free rate 1/k² of block Krylov methods (Musco and Musco 2015) applied to the
    last gain; from four blocks on Aitken's extrapolation of the gains.

    Args:
        total: ‖A‖².
        captured: with the present rank after the latest blocks, two or more values.
        blocks: in the basis.
        best: `energy_bound`.
    """
    now = captured[-1]
    gain = max(now - captured[-2], 0.0)
    estimates = [gap(total, now, best), gap(total, now, now + blocks / 2 * gain)]
    if blocks >= _AITKEN_FROM and len(captured) > 2:  # noqa: PLR2004
        before = captured[-2] - captured[-3]
        if 0 < gain < before:
            ratio = gain / before
            estimates.append(gap(total, now, now + _AITKEN_FACTOR * gain * ratio / (1 - ratio)))
    return min(estimates)
