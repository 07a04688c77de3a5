"""Truncation of a product of low-rank factors to factors in float32, and what is true of these as they are written."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from loratools.errors import MismatchError, NonFiniteError
from loratools.linalg._core import Core, core_of, through_products
from loratools.linalg._info import Goal, SVDInfo, make_goal
from loratools.linalg._rank import FLOAT32_FLOOR, rank_for_tail
from loratools.linalg._rounding import non_finite_count
from loratools.linalg._truncated_svd import balanced_factors

_DOUBT = 1e-9  # relative rounding error of a residual from float64 factors


@dataclasses.dataclass(frozen=True, slots=True)
class Reduced:
    """Factors of lower rank.

    Attributes:
        lora_A: (r, n) float32, √S on each side.
        lora_B: (m, r) float32.
        sigma2: (r,) float64, squared singular values of lora_B·lora_A before it was rounded, descending.
        info: of the factors as they are, in the plain norm.
        weighted: the same in the norm that the inputs' weights make, if there are any.
    """

    lora_A: Tensor
    lora_B: Tensor
    sigma2: Tensor
    info: SVDInfo
    weighted: SVDInfo | None


def reduce_low_rank(A: Tensor, B: Tensor, *, weights: Tensor | None = None, **rule: Any) -> Reduced:
    """The best factors of lower rank for B·A, or, with weights, for ‖(B·A − Δ̂)·diag(weights)‖_F.

    As `truncate_low_rank`: QR of both factors and SVD of the core in float64, or the iteration; no (m, n) matrix. With
    weights it is always the core: A's columns are scaled before the QR, and the left vectors U that come out are
    projected on, Δ̂ = U·Uᵀ·B·A, so that nothing is divided by a weight (as `truncated_svd_weighted`).

    Law: residual as there, and the residual that is reported is that of the float32 factors.

    Args:
        A: (R, n), any float dtype.
        B: (m, R), any float dtype.
        weights: (n,), positive; see `input_weights`. The rule is meant in that norm.
        rule: as `truncate_low_rank` takes it.

    Raises:
        MismatchError: A, B and weights do not fit.
        NonFiniteError: NaN or infinity, in the factors or in what would be written.
        UsageError: not exactly one goal.
    """
    goal = make_goal(rule.pop("rank", None), rule.pop("energy", None), rule.pop("error", None),
                     rule.pop("max_rank", 256), **rule)  # fmt: skip
    if weights is not None and (weights.shape != A.shape[1:] or not bool((weights > 0).all())):
        raise MismatchError("There must be a positive weight for every column.", shape=tuple(weights.shape))
    if weights is None and (quick := through_products(A, B, goal)) is not None:
        return _of_triples(A, B, quick)
    core = core_of(A, B, weights)
    kept, reached = _chosen(core, goal)
    left = core.left @ core.P[:, :kept]
    if weights is None:
        S, right = core.S[:kept], core.Wt[:kept] @ core.right
    else:
        left, S, right = _projected(left, A, B)
    exact = balanced_factors(left, S, right)
    found = _Written(core, kept, exact, weights)
    if non_finite_count(found.lora_A) + non_finite_count(found.lora_B):
        raise NonFiniteError("The truncated factors overflow float32.", norm=float(core.S.square().sum().sqrt()))
    plain = found.info(goal, reached, weighted=False)
    return Reduced(found.lora_A, found.lora_B, S.square(), plain,
                   None if weights is None else found.info(goal, reached, weighted=True))  # fmt: skip


def _of_triples(A: Tensor, B: Tensor, quick: tuple[Tensor, Tensor, Tensor, SVDInfo]) -> Reduced:
    """Factors from singular triples, with what is left of B·A, ‖BA‖² − 2⟨BA, Δ̂⟩ + ‖Δ̂‖², in float64."""
    U, S, Vh, info = quick
    down, up = (each.to(torch.float32) for each in balanced_factors(*(each.to(torch.float64) for each in (U, S, Vh))))
    if non_finite_count(down) + non_finite_count(up):
        raise NonFiniteError("The truncated factors overflow float32.", norm=info.norm)
    wide, tall = down.to(torch.float64), up.to(torch.float64)
    both = float(((tall.T @ B.to(torch.float64)) * (wide @ A.to(torch.float64).T)).sum())
    size = float(((tall.T @ tall) * (wide @ wide.T)).sum())
    left = math.sqrt(max(info.norm**2 - 2 * both + size, 0.0))
    claimed = info.certificate
    if claimed is not None:
        claimed = max(left * (1 + claimed) / info.residual - 1, 0.0) + _DOUBT
    info = dataclasses.replace(info, residual=left, captured=min(size / info.norm**2, 1.0), certificate=claimed)
    return Reduced(down, up, S.to(torch.float64).square(), info, None)


def _chosen(core: Core, goal: Goal) -> tuple[int, bool]:
    sigma2 = core.S.square()
    total = float(sigma2.sum())
    if total == 0:
        return 0, True
    rank, reached = goal.choose(sigma2, total)
    return min(rank, rank_for_tail(sigma2, total, 0.0)), reached


def _projected(left: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of U·Uᵀ·B·A for orthonormal U (m, r)."""
    across = (left.T @ B.to(torch.float64)) @ A.to(torch.float64)
    right, turn = torch.linalg.qr(across.T)
    P, S, Wt = torch.linalg.svd(turn.T, full_matrices=False)
    return left @ P, S, Wt @ right.T


class _Written:
    """Factors rounded to float32, and how far their product is from B·A.

    With T what the truncation leaves and E what rounding adds, B·A − Δ̂ = T − E. E = dB·A' + B'·dA for factors that are
    rounded by dB and dA; nothing that is large is subtracted, so that no digits are lost.
    """

    def __init__(self, core: Core, kept: int, exact: tuple[Tensor, Tensor], weights: Tensor | None) -> None:
        self.core, self.kept, self.weights = core, kept, weights
        down, self.up = exact
        self.lora_A, self.lora_B = down.to(torch.float32), self.up.to(torch.float32)
        self.down = self.lora_A.to(torch.float64)
        self.slip_A, self.slip_B = self.down - down, self.lora_B.to(torch.float64) - self.up

    def info(self, goal: Goal, reached: bool, *, weighted: bool) -> SVDInfo:
        """What is known of them, in one norm."""
        scale = self.weights if weighted and self.weights is not None else None
        coordinates = self.core.plain if self.weights is not None and scale is None else self.core.weighted
        behind = self.core.P[:, self.kept :]
        rest = behind.T @ (self.core.up @ coordinates.T)
        total = float((self.core.up @ coordinates.T).square().sum())
        tail = float(rest.square().sum())
        left = max(tail + self._slip(scale) - 2 * self._cross(behind, scale), 0.0)
        captured = min(self._size(scale) / total, 1.0) if total else 1.0
        known = tail > FLOAT32_FLOOR * total and (scale is not None or self.weights is None)
        if self.kept == 0:
            left = total
        return SVDInfo(
            rank=self.kept,
            captured=captured if self.kept or not total else 0.0,
            residual=math.sqrt(left),
            certificate=max(math.sqrt(left / tail) - 1, 0.0) + _DOUBT if known else None,
            certificate_kind="proven" if known else None,
            products=0,
            method="qr-core",
            norm=math.sqrt(total),
            clipped=goal.rank is not None and goal.rank > self.kept,
            reached=reached,
        )

    def _slip(self, scale: Tensor | None) -> float:
        """‖dB·A' + B'·dA‖²."""
        down, slip = _times(self.down, scale), _times(self.slip_A, scale)
        one = ((self.slip_B.T @ self.slip_B) * (down @ down.T)).sum()
        two = ((self.up.T @ self.up) * (slip @ slip.T)).sum()
        both = ((self.slip_B.T @ self.up) * (down @ slip.T)).sum()
        return float(one + two + 2 * both)

    def _cross(self, behind: Tensor, scale: Tensor | None) -> float:
        """⟨T, dB·A'⟩; T is orthogonal to B'·dA."""
        coordinates = self.core.balanced_A
        onto = (coordinates if scale is None else coordinates * scale) @ _times(self.down, scale).T
        return float(((self.core.left @ (behind @ (behind.T @ (self.core.up @ onto)))) * self.slip_B).sum())

    def _size(self, scale: Tensor | None) -> float:
        """‖Δ̂‖²."""
        down, up = _times(self.down, scale), self.lora_B.to(torch.float64)
        return float(((up.T @ up) * (down @ down.T)).sum())


def _times(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows * scale
