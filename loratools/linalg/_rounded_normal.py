"""What rounding does to normal numbers that may be smaller than the grid: moments, and noise from them.

x normal of size τ is rounded to a multiple of u. With t = τ/u: E round(x)² = u²·s(t), and round(x) = c(t)·x + a rest
that is not correlated with x, of variance u²·(s − c²t²). For t ≫ 1, c = 1 and the rest is u²/12; for t ≪ 1 nearly
nothing moves, and what does is nearly all rest.
"""

from __future__ import annotations

import functools
import math
from typing import Final

import torch
from torch import Tensor

BINS: Final = 32
"""Spacings that are told apart, each half the one before; smaller ones are as good as none."""
_STEPS: Final = 4  # per octave of τ
_LEAST: Final = -3  # log₂ t below which nothing moves: 4 standard deviations to the first middle
_MOST: Final = 6  # and above which rounding is independent of x
_LINES: Final = 1024  # at a time
_OCTAVES: Final = 24  # of τ above the largest spacing


def noise_of_lines(counts: Tensor, squares: Tensor, widest: float) -> Tensor:
    """The variance of the noise in lines (rows or columns) of W' − W, summed over their entries.

    Per line, τ is the size that makes the expected Σ (W' − W)² what it is. As c depends on u, and u on the entry, the
    noise is the rest and (c − c̄)·ΔW, c̄ being the mean: τ²·(Σ c² − (Σ c)²/N).

    Args:
        counts: (k, BINS), entries of the line whose spacing is widest·2^-bin.
        squares: (k,) float64, Σ (W' − W)² of every line.
        widest: the largest spacing.

    Returns:
        (k,) float64.
    """
    firsts = range(0, max(len(squares), 1), _LINES)
    return torch.cat([_noise(counts[at : at + _LINES], squares[at : at + _LINES], widest) for at in firsts])


def _noise(counts: Tensor, squares: Tensor, widest: float) -> Tensor:
    second, slope, slope2, rest = _tables()
    scaled, counts = squares / widest**2, counts.to(torch.float64)
    expected = counts @ second
    at = torch.searchsorted(expected, scaled[:, None]).clamp(1, expected.shape[1] - 1)
    low, high = expected.gather(1, at - 1)[:, 0], expected.gather(1, at)[:, 0]
    part = ((scaled - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    tau2 = 4.0 ** _exponents(expected.shape[1])
    uneven = (counts @ slope2 - (counts @ slope).square() / counts.sum(1, keepdim=True).clamp_min(1)).clamp_min(0)
    noise = counts @ rest + tau2 * uneven
    found = noise.gather(1, at - 1)[:, 0] * (1 - part) + noise.gather(1, at)[:, 0] * part
    return found * widest**2


def _exponents(size: int) -> Tensor:
    """log₂ τ/widest of the grid."""
    return (_LEAST - BINS + 1) + torch.arange(size, dtype=torch.float64) / _STEPS


@functools.cache
def _tables() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(BINS, sizes): s·u², c, c², (s − c²t²)·u², in units of the widest spacing."""
    grid = _exponents((BINS - 1 + _OCTAVES - _LEAST) * _STEPS + 1)
    log_t = grid + torch.arange(BINS, dtype=torch.float64)[:, None]
    t = 2.0 ** log_t.clamp(_LEAST, _MOST)
    second, slope = torch.zeros_like(t), torch.zeros_like(t)
    for k in range(1, 5 * 2**_MOST):
        edge = (k - 0.5) / t
        second += (2 * k - 1) * torch.erfc(edge / math.sqrt(2))
        slope += 2 * torch.exp(-edge.square() / 2) / (math.sqrt(2 * math.pi) * t)
    rest = (second - (slope * t).square()).clamp_min(0)
    none, free = log_t < _LEAST, log_t > _MOST
    second = torch.where(free, 4.0**log_t + 1 / 12, second).masked_fill(none, 0)
    slope = slope.masked_fill(none, 0).masked_fill(free, 1)
    rest = rest.masked_fill(none, 0).masked_fill(free, 1 / 12)
    unit = 0.25 ** torch.arange(BINS, dtype=torch.float64)[:, None]
    return second * unit, slope, slope.square(), rest * unit
