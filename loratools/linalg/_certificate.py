"""How far from the best: what a Krylov basis says about the part of the matrix that it has not seen.

In the basis [V, V⊥] the matrix AᵀA is [[H, C], [Cᵀ, D]]. With the next Krylov block at hand C is known, and for any
mu ≥ ‖D‖ the eigenvalues of AᵀA are at most those of [[H, E], [Eᵀ, mu·I]]. The bound is as good as mu, for which there
are two: an estimate from the newest block, a heuristic; and `deflated_norm`, all uses of which in
one decomposition together fail with probability 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.linalg._basis import AbstractBasis
from loratools.linalg._orth import orthonormal_rows

_SAFETY = 1.5  # the newest block's largest Ritz value is 0.6 to 1.0 of ‖D‖
_FIRST, _MARGIN = 0.85, 1.2  # of `estimated_gap`
_FULLEST, _FILLING = 0.55, 1.5
_CHAINS = 4
_STEPS = 10
_FAILURE = 1e-6 / 32  # a decomposition asks for a proof after every block, at most some twenty times
_ROUNDING = 1e-4  # relative, of float32 products and of couplings taken for what they should be


def likely_norm(H: Tensor, newest: int) -> float:
    """An estimate of ‖D‖ from above: no violation was seen, none is excluded."""
    return _SAFETY * float(torch.linalg.eigvalsh(H[-newest:, -newest:])[-1])


def deflated_norm(basis: AbstractBasis, seed: int) -> float:
    """A bound on ‖D‖ = ‖A(I − VᵀV)‖² that fails with probability at most 1e-6/32; 20 products with 4 vectors.

    Ten Lanczos steps from each of four independent Gaussian vectors. After k steps from one the largest Ritz value is
    below (1 − ε)·‖D‖ with probability at most 1.648·√n·exp(−√ε·(2k − 1)): Kuczyński and Woźniakowski, "Estimating
    the largest eigenvalue by the power and Lanczos algorithms with a random start" (1992). All four chains would have
    to fail; the space that they span together is at least as good as the best of them.
    """
    n = basis.matrix.shape[1]
    probe = basis.another(_CHAINS * _STEPS)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn((_CHAINS, n), generator=generator).to(basis.V.device)
    Z = orthonormal_rows(probe.outside(orthonormal_rows(probe.outside(start))[0]))[0]
    coupling = torch.empty((0, Z.shape[0]))
    while Z.shape[0] and probe.room:
        probe.append(Z[: probe.room], coupling)
        if probe.room:
            Z, coupling = probe.next_block()
    if not probe.width:
        return 0.0
    largest = max(float(torch.linalg.eigvalsh(probe.H)[-1]), 0.0)
    if not probe.room:
        chance = _FAILURE ** (1 / _CHAINS)
        largest /= 1 - (math.log(1.648 * math.sqrt(n) / chance) / (2 * _STEPS - 1)) ** 2
    return largest * (1 + _ROUNDING)


def energy_bound(H: Tensor, coupling: Tensor, rank: int, mu: float) -> float:
    """Upper bound on the energy that the best rank-`rank` approximation captures, if mu ≥ ‖D‖.

    Args:
        H: (w, w) float64, V·AᵀA·Vᵀ, the newest block last.
        coupling: (newest, c) float64, the newest block's rows of C; the rest of C is zero.
        rank: of the approximation.
        mu: bound on, or estimate of, the largest eigenvalue of D.
    """
    width, (newest, extra) = H.shape[0], coupling.shape
    bordered = torch.zeros((width + extra, width + extra), dtype=torch.float64)
    bordered[:width, :width] = H
    bordered[width - newest : width, width:] = coupling
    bordered[width:, width - newest : width] = coupling.T
    bordered[width:, width:].fill_diagonal_(mu)
    values: Tensor = torch.linalg.eigvalsh(bordered).flip(0)[:rank].clamp_min(mu)
    return float(values.sum()) + mu * max(rank - values.numel(), 0)


def gap(total: float, captured: float, best: float) -> float:
    """residual/optimum − 1 if no approximation captures more than `best`; infinite where that says nothing."""
    if best >= total:
        return math.inf
    return math.sqrt(max(total - captured, 0.0) / (total - best)) - 1.0


def estimated_gap(total: float, captured: Sequence[float], depth: float, share: float) -> float:
    """An estimate of residual/optimum − 1 from the latest gain; what the stopping rule looks at.

    Without a gap in the spectrum the missing energy falls like 1/k² (Musco and Musco 2015), which leaves
    (k − 1)²/(2k − 1) of what the last block gained, less where the basis fills a good part of the space. The factors
    are those of flat spectra, the hardest ones, with a margin.

    Args:
        total: ‖A‖².
        captured: after a block less, and now.
        depth: k, the number of blocks; a half step counts as half a block.
        share: of the n dimensions that the basis takes up.
    """
    before, now = captured
    left = max(_FIRST, _MARGIN * (depth - 1) ** 2 / (2 * depth - 1)) * max(_FULLEST, 1 - _FILLING * share)
    return gap(total, now, now + left * max(now - before, 0.0))
