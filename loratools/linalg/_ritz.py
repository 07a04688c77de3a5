"""From a subspace to singular triples, and the residual that they leave."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from loratools.linalg._host import to_host
from loratools.linalg._orth import orthonormal_round, orthonormal_rows
from loratools.linalg._prepare import AbstractMatrix

_CANCELS = 5e-2  # residual²/total below which T − c is replaced by a measurement
_ROWS = 16  # widened at a time
_NEEDS_FLOAT64 = 1e-5  # and below which float32 products would hide it


@dataclasses.dataclass(frozen=True, slots=True)
class Triples:
    """Ut (r, m) and Vt (r, n), singular vectors as float32 rows; S (r,), float32 values as float64 on the CPU.

    Attributes:
        explained: 2⟨A, X⟩ − ‖X‖² for X = U·S·V.
    """

    Ut: Tensor
    S: Tensor
    Vt: Tensor
    explained: float


@dataclasses.dataclass(frozen=True, slots=True)
class Approximation:
    """What an algorithm hands over: orthonormal rows on one side, and A times them.

    Attributes:
        images: (r, m) float32, the rows of (A·basisᵀ)ᵀ; (r, n), those of basis·A, if `left`.
        basis: (r, n) float32, orthonormal rows; (r, m) if `left`.
        left: the basis multiplies A from the left.
        reached: the goal is met.
        products: with A or Aᵀ.
        best: upper bound on the energy that any approximation of this rank captures, or None.
        proven: `best` holds without assumptions, or fails with probability 1e-6.
        method: for the report.
    """

    images: Tensor
    basis: Tensor
    reached: bool
    products: int
    best: float | None
    proven: bool
    method: str
    left: bool = False


def triples(found: Approximation) -> Triples:
    """Singular triples of the approximation: images = L·Q, L = P·S·Wᵀ, so one side is Wᵀ·Q, the other Pᵀ·basis."""
    basis, images = found.basis, found.images
    if found.left:  # its vectors are combinations of float32 rows: orthonormal to the condition of the combination
        basis, turn, _ = orthonormal_round(basis)
        images = torch.linalg.lstsq(turn, torch.eye(len(turn), dtype=turn.dtype)).solution.to(images) @ images
    Q, L = orthonormal_rows(images)
    P, S, Wt = torch.linalg.svd(L, full_matrices=False)
    near, far, S = Wt.to(Q) @ Q, P.T.to(basis) @ basis, S.to(torch.float32).to(torch.float64)
    explained = _explained(near, S, far)
    return Triples(far, S, near, explained) if found.left else Triples(near, S, far, explained)


def residual(matrix: AbstractMatrix, found: Triples) -> float:
    """‖A − U·S·V‖_F of the float32 factors.

    T − c where that keeps six digits, with c corrected for the small loss of orthogonality; else measured in row
    chunks, in float64 once float32 products would hide it.
    """
    total = matrix.total
    if total - found.explained > _CANCELS * total:
        return math.sqrt(total - found.explained)
    left = found.Ut * found.S.to(found.Ut)[:, None]
    coarse = matrix.distance(left, found.Vt, torch.float32)
    if coarse**2 > _NEEDS_FLOAT64 * total:
        return coarse
    exact = found.Ut.to(torch.float64) * found.S.to(found.Ut.device)[:, None]
    return matrix.distance(exact, found.Vt, torch.float64)


def _explained(near: Tensor, S: Tensor, far: Tensor) -> float:
    """2⟨A, X⟩ − ‖X‖², with A·far = near·S and the vectors as long as they are, not as long as they should be."""
    one, other = to_host(_squares(near), _squares(far))
    return float((S.square() * one * (2 - other)).sum())


def _squares(rows: Tensor) -> Tensor:
    pieces = [rows[first : first + _ROWS].to(torch.float64) for first in range(0, len(rows), _ROWS)]
    return torch.cat([piece.square().sum(1) for piece in pieces]) if pieces else rows.new_empty(0)
