"""The small and the exact path: float64 Gram matrix, its eigenvectors, one Rayleigh-Ritz product.

Float64 sums of float32 data keep every singular value above 1e-8 of the largest, and no m×n copy is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loratools.linalg._info import Goal
from loratools.linalg._prepare import HeldMatrix, chunk_rows
from loratools.linalg._rank import FLOAT32_FLOOR, rank_for_tail
from loratools.linalg._ritz import Approximation


def dense(matrix: HeldMatrix, goal: Goal) -> Approximation:
    """The best approximation that meets the goal. Time O(m·n² + n³), n the smaller side."""
    A = matrix.A
    values, vectors = torch.linalg.eigh(_normal_matrix(A))
    sigma2 = values.flip(0).clamp_min_(0).cpu()
    total = float(sigma2.sum())
    rank, reached = goal.choose(sigma2, total)
    rank = min(rank, rank_for_tail(sigma2, total, 0.0))
    chosen = vectors[:, vectors.shape[1] - rank :].flip(1)
    Yt = torch.empty((rank, A.shape[0]), dtype=torch.float32, device=A.device)
    for first, chunk in _chunks(A):
        Yt[:, first : first + chunk.shape[0]] = (chunk @ chosen).T
    best = float(sigma2[:rank].sum())
    settled = total - best > 10 * FLOAT32_FLOOR * total
    return Approximation(Yt, chosen.T.to(torch.float32), reached, 0, best if settled else None, True, "dense")


def _normal_matrix(A: Tensor) -> Tensor:
    total = torch.zeros((A.shape[1], A.shape[1]), dtype=torch.float64, device=A.device)
    for _, chunk in _chunks(A):
        total.addmm_(chunk.T, chunk)
    return total


def _chunks(A: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Float64 rows, one buffer for all: a chunk is valid until the next one."""
    step = min(chunk_rows(A), A.shape[0])
    buffer = torch.empty((step, A.shape[1]), dtype=torch.float64, device=A.device)
    for first in range(0, A.shape[0], step):
        count = min(step, A.shape[0] - first)
        yield first, buffer[:count].copy_(A[first : first + count])
