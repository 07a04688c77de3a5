"""The small and the exact path: float64 Gram matrix, its eigenvectors, one Rayleigh-Ritz product.

Float64 sums of float32 data keep every singular value above 1e-8 of the largest, and no m×n copy is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loratools.linalg._host import to_host
from loratools.linalg._info import Goal
from loratools.linalg._prepare import AbstractMatrix
from loratools.linalg._rank import FLOAT32_FLOOR, rank_for_tail
from loratools.linalg._ritz import Approximation

_ON_HOST = 1024


def dense(matrix: AbstractMatrix, goal: Goal) -> Approximation:
    """The best approximation that meets the goal. Time O(m·n² + n³) for an m×n matrix, two passes over its rows."""
    m, n = matrix.shape
    normal = torch.zeros((n, n), dtype=torch.float64, device=matrix.device)
    for _, chunk in _widened(matrix):
        normal.addmm_(chunk.T, chunk)
    if n <= _ON_HOST:  # CUDA's eigensolver is slower than the way to the CPU and back
        (normal,) = to_host(normal)
    values, vectors = torch.linalg.eigh(normal)
    (sigma2,) = to_host(values.flip(0).clamp_min_(0))
    total = float(sigma2.sum())
    rank, reached = goal.choose(sigma2, total)
    rank = min(rank, rank_for_tail(sigma2, total, 0.0))
    chosen = vectors[:, vectors.shape[1] - rank :].flip(1).to(matrix.device)
    images = torch.empty((rank, m), dtype=torch.float32, device=matrix.device)
    for mine, chunk in _widened(matrix):
        images[:, mine] = (chunk @ chosen).T
    best = float(sigma2[:rank].sum())
    settled = total - best > 10 * FLOAT32_FLOOR * total
    basis = chosen.T.to(torch.float32)
    return Approximation(images, basis, reached, 0, best if settled else None, True, "dense")


def _widened(matrix: AbstractMatrix) -> Iterator[tuple[slice, Tensor]]:
    """Float64 chunks, one buffer for all."""
    buffer: Tensor | None = None
    for mine, chunk in matrix.chunks():
        if buffer is None or len(buffer) < len(chunk):
            buffer = torch.empty(chunk.shape, dtype=torch.float64, device=chunk.device)
        yield mine, buffer[: len(chunk)].copy_(chunk)
