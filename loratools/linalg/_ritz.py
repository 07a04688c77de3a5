"""From a subspace to singular triples, and the residual that they leave."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from loratools.linalg._orth import gram, orthonormal_rows
from loratools.linalg._prepare import Prepared, chunk_rows

_CANCELS = 5e-2  # residual²/total below which T − c is replaced by a measurement
_NEEDS_FLOAT64 = 1e-7  # and below which float32 products would hide it


@dataclasses.dataclass(frozen=True, slots=True)
class Triples:
    """Ut (r, m) and Vt (r, n), singular vectors as float32 rows; S (r,), float32 values as float64 on the CPU."""

    Ut: Tensor
    S: Tensor
    Vt: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Approximation:
    """What an algorithm hands over.

    Attributes:
        Yt: (r, m) float32, the rows of (A·Vtᵀ)ᵀ.
        Vt: (r, n) float32, orthonormal rows.
        reached: the goal is met.
        products: with A or Aᵀ.
        best: upper bound on the energy that any approximation of this rank captures, or None.
        proven: `best` holds without assumptions.
        method: for the report.
    """

    Yt: Tensor
    Vt: Tensor
    reached: bool
    products: int
    best: float | None
    proven: bool
    method: str


def triples(Yt: Tensor, Vt: Tensor) -> Triples:
    """Singular triples of Yᵀ·V: Y = L·Q, L = P·S·Wᵀ, so U = Q-side W and V turned by P."""
    Q, L = orthonormal_rows(Yt)
    P, S, Wt = torch.linalg.svd(L, full_matrices=False)
    return Triples(Wt.to(Q) @ Q, S.to(torch.float32).to(torch.float64), P.T.to(Vt) @ Vt)


def residual(prepared: Prepared, found: Triples) -> float:
    """‖A − U·S·V‖_F of the float32 factors.

    T − c where that keeps six digits, with c corrected for the small loss of orthogonality; else measured in row
    chunks, in float64 once float32 products would hide it.
    """
    total = prepared.total
    explained = _explained(found)
    if total - explained > _CANCELS * total:
        return math.sqrt(total - explained)
    left = found.Ut * found.S.to(found.Ut)[:, None]
    coarse = measured(prepared, left, found.Vt, torch.float32)
    if coarse**2 > _NEEDS_FLOAT64 * total:
        return coarse
    exact = found.Ut.to(torch.float64) * found.S.to(found.Ut.device)[:, None]
    return measured(prepared, exact, found.Vt, torch.float64)


def _explained(found: Triples) -> float:
    """2⟨A, X⟩ − ‖X‖² for X = U·S·V, with A·V = U·S: both Gram matrices as they are, not as they should be."""
    scale = torch.outer(found.S, found.S)
    left = gram(found.Ut, found.Ut) * scale
    return float(2 * left.trace() - (left * gram(found.Vt, found.Vt)).sum())


def measured(prepared: Prepared, left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
    """‖A − leftᵀ·right‖_F, streamed over the rows of A as it is stored.

    Args:
        prepared: A, (m, n).
        left: (r, m).
        right: (r, n).
        dtype: of the products; sums are float64 in any case.
    """
    stored = prepared.A.T if prepared.flipped else prepared.A
    rows, columns = (right, left) if prepared.flipped else (left, right)
    columns = columns.to(dtype)
    step = max(1, chunk_rows(stored) // (1 if dtype == torch.float32 else 2))
    total = 0.0
    for first in range(0, stored.shape[0], step):
        gap = stored[first : first + step].to(dtype, copy=True)
        gap.addmm_(rows[:, first : first + step].to(dtype).T, columns, alpha=-1)
        total += float(torch.linalg.vector_norm(gap, dim=1).to(torch.float64).square().sum())
    return math.sqrt(total)
