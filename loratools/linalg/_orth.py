"""Orthonormal rows by CholeskyQR, and Gram matrices in float64.

Vectors are rows here: a block of b vectors of length L is (b, L), contiguous. Yamamoto, Nakatsukasa, Yanagisawa,
Fukaya, "Roundoff error analysis of the CholeskyQR2 algorithm" (2015); with the Gram matrix in float64 a float32
block of any condition below 1e6 is orthonormal to a few 1e-7 after two rounds; what is dependent is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.linalg._host import to_host

_CHUNK = 2**18  # entries that are widened to float64 at a time
_SMALLEST_PIVOT = 1e-4
_DEPENDENT = 1e-11  # relative eigenvalue of the scaled Gram matrix: 3e-6 of the largest direction
_WELL = 0.3  # smallest pivot of unit rows: one round leaves errors of a few 1e-7


def gram(X: Tensor, Y: Tensor) -> Tensor:
    """X·Yᵀ accumulated in float64.

    Args:
        X: (p, L) float32.
        Y: (q, L) float32.

    Returns:
        (p, q) float64 on their device.
    """
    length = X.shape[1]
    step = max(256, _CHUNK // max(X.shape[0], 1)) if X.device.type == "cpu" else max(length, 1)
    total = X.new_zeros((X.shape[0], Y.shape[0]), dtype=torch.float64)
    for first in range(0, length, step):
        wide = X[:, first : first + step].to(torch.float64)
        other = wide if X is Y else Y[:, first : first + step].to(torch.float64)
        total.addmm_(wide, other.T)
    return total


def orthonormal_rows(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal rows and L with Y = L·Q; a second round where the first one's input needs it.

    Args:
        Y: (b, length) float32.

    Returns:
        Q (b', length) float32, b' ≤ b: dependent directions are left out; L (b, b') float64 on the CPU.
    """
    Q, L, well = orthonormal_round(Y)
    if well:
        return Q, L
    Q, turn, _ = orthonormal_round(Q)
    return Q, L @ turn


def orthonormal_round(Y: Tensor, *, least: float = 0.0) -> tuple[Tensor, Tensor, bool]:
    """One round of `orthonormal_rows`: orthonormal up to float32 errors times Y's condition.

    Args:
        Y: (b, length) float32.
        least: directions whose squared length in Y is below this are left out, too.

    Returns:
        Q, L, and whether Y's rows were far enough from dependent for one round.
    """
    if Y.shape[0] == 0:
        return Y, torch.empty((0, 0), dtype=torch.float64), True
    (G,) = to_host(gram(Y, Y))
    return _applied(Y, *_factor(G, least))


def _applied(Y: Tensor, step: Tensor, inverse: Tensor, least_pivot: float) -> tuple[Tensor, Tensor, bool]:
    applied = inverse.to(torch.float32)
    if least_pivot and least_pivot < _WELL:  # L has to belong to the rounded inverse
        unit = torch.eye(len(step), dtype=step.dtype)
        step = torch.linalg.solve_triangular(applied.to(torch.float64), unit, upper=False)
    return applied.to(Y.device) @ Y, step, least_pivot >= _WELL


def hopeful_round(Y: Tensor, *, least: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`orthonormal_round` without waiting for the device, as if nothing were dependent or too short.

    Args:
        Y: (b, length) float32, or (k, b, length) for k blocks at once.
        least: as for `orthonormal_round`.

    Returns:
        Q like Y, L (…, b, b) float64, and whether it holds: a boolean scalar, or one a block; all on Y's device.
    """
    wide = Y.to(torch.float64)
    G = wide @ wide.mT
    scale = _lengths(G, least)
    factor, failed = torch.linalg.cholesky_ex(G / scale.unsqueeze(-1) / scale.unsqueeze(-2))
    inverse = torch.linalg.solve_triangular(factor, torch.diag_embed(1 / scale), upper=False)
    pivot = factor.diagonal(dim1=-2, dim2=-1).amin(-1)
    fine = (failed == 0) & (pivot > max(_SMALLEST_PIVOT, least**0.5))
    return inverse.to(torch.float32) @ Y, scale.unsqueeze(-1) * factor, fine


def _lengths(G: Tensor, least: float) -> Tensor:
    length = G.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return torch.where(length > 0, length, 1.0) if least == 0 else torch.ones_like(length)


def _factor(G: Tensor, least: float) -> tuple[Tensor, Tensor, float]:
    """S (b, b') and its left inverse (b', b) with G = S·Sᵀ up to what is dependent or too short.

    Also the smallest pivot of the rows scaled to length 1, 0 where a triangular S would not do.
    """
    scale = _lengths(G, least)
    scaled = G / scale[:, None] / scale
    factor, failed = torch.linalg.cholesky_ex(scaled)
    pivot = 0.0 if int(failed) else float(factor.diagonal().min())
    if pivot > max(_SMALLEST_PIVOT, least**0.5):
        inverse = torch.linalg.solve_triangular(factor, torch.diag(1 / scale), upper=False)
        return scale[:, None] * factor, inverse, pivot
    values, vectors = torch.linalg.eigh(scaled)
    keep = values > max(_DEPENDENT * float(values[-1]), least)
    root, vectors = values[keep].sqrt(), vectors[:, keep]
    return scale[:, None] * vectors * root, (vectors / root).T / scale, 0.0
