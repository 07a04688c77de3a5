"""Truncation of a product of low-rank factors through its R×R core; the m×n matrix is never formed."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loratools.errors import MismatchError, NonFiniteError
from loratools.linalg._info import Goal, SVDInfo, make_goal
from loratools.linalg._rank import rank_for_tail
from loratools.linalg._rounding import non_finite_count, power_of_two

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratools.linalg._rules import RankRules


def truncate_low_rank(
    A: Tensor,
    B: Tensor,
    rank: int | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
    max_rank: int = 256,
    **others: Unpack[RankRules],
) -> tuple[Tensor, Tensor, Tensor, SVDInfo]:
    """The best approximation of B·A: QR of both factors, SVD of the core, everything in float64.

    Columns of B and rows of A are first balanced by powers of two, so adapters of very different sizes may
    be concatenated. Time O((m + n)·R² + R³), memory about 40·(m + n)·R bytes. Where R is many times the rank that is
    asked for, a block Krylov iteration that multiplies by A and B in turn takes its place (`method` says so), unless
    the terms cancel or hardly anything is left over.

    Law: residual ≤ (1 + 1e-6)·optimum + 2e-7·‖BA‖ through the core, ≤ 1.001·optimum by the iteration. Rank-deficient
    and zero factors are no special case.

    Args:
        A: (R, n), any float dtype; for Σ s_i·B_i·A_i the A_i below each other.
        B: (m, R), any float dtype; the s_i·B_i side by side.
        rank: number of triples.
        energy: as for `truncated_svd`.
        error: as for `truncated_svd`.
        max_rank: as for `truncated_svd`.
        others: as for `truncated_svd`; the R singular values of the core are all that are not zero. `knee` looks at
            these alone.

    Returns:
        U (m, r), S (r,), Vh (r, n) float32 and an `SVDInfo`, whose residual is that before the factors are rounded
        to float32.

    Raises:
        MismatchError: A and B do not fit.
        NonFiniteError: NaN or infinity.
        UsageError: not exactly one goal.
    """
    goal = make_goal(rank, energy, error, max_rank, **others)
    if (quick := through_products(A, B, goal)) is not None:
        return quick
    left, P, S, Wt, right = decomposed_core(A, B)
    info = chosen_of(goal, S)
    kept = info.rank
    return (left @ P[:, :kept]).float(), S[:kept].float(), (Wt[:kept] @ right).float(), info


def through_products(A: Tensor, B: Tensor, goal: Goal) -> tuple[Tensor, Tensor, Tensor, SVDInfo] | None:
    """The same by `krylov_of_product`, where that is faster and exact enough; else None.

    Raises:
        MismatchError: A and B do not fit.
        NonFiniteError: NaN or infinity.
    """
    from loratools.linalg._product_krylov import krylov_of_product, pays

    _check(A, B)
    if not pays((B.shape[0], A.shape[1]), A.shape[0], goal):
        return None
    return krylov_of_product(*_balanced(A.to(torch.float64), B.to(torch.float64), None), goal, seed=0)


def decomposed_core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Left, P, S, Wt, right with B·A = (left P) S (Wt right), float64, of as many triples as the core has.

    Raises:
        MismatchError: A and B do not fit.
        NonFiniteError: NaN or infinity.
    """
    core = core_of(A, B)
    return core.left, core.P, core.S, core.Wt, core.right


def chosen_of(goal: Goal, S: Tensor) -> SVDInfo:
    """How many of all singular values of a product, descending, a goal takes, and what that leaves."""
    sigma2 = S.square()
    total = float(sigma2.sum())
    if total == 0:
        chosen, reached = 0, True
    else:
        chosen, reached = goal.choose(sigma2, total)
        chosen = min(chosen, rank_for_tail(sigma2, total, 0.0))
    return SVDInfo(
        rank=chosen,
        captured=float(sigma2[:chosen].sum()) / total if total else 1.0,
        residual=math.sqrt(float(sigma2[chosen:].sum())),
        certificate=0.0,
        certificate_kind="proven",
        products=0,
        method="qr-core",
        norm=math.sqrt(total),
        clipped=goal.rank is not None and goal.rank > chosen,
        reached=reached,
    )


def _check(A: Tensor, B: Tensor) -> None:
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:  # noqa: PLR2004
        raise MismatchError("The factors do not fit.", lora_A=tuple(A.shape), lora_B=tuple(B.shape))
    bad = non_finite_count(A) + non_finite_count(B)
    if bad:
        raise NonFiniteError("The factors hold NaN or infinity.", entries=bad)


@dataclasses.dataclass(frozen=True, slots=True)
class Core:
    """B·A through orthonormal bases, with p = min(m, R) and q = min(n, R): B·A·diag(weights) = left·P·S·Wt·right.

    Attributes:
        left: (m, p).
        up: (p, R), balanced B = left·up.
        balanced_A: (R, n), A with its rows balanced, not weighted.
        right: (q, n), orthonormal rows that span A·diag(weights).
        weighted: (q, R): A·diag(weights), balanced, is weightedᵀ·right.
        plain: (·, R), so that ‖X·balanced_A‖ = ‖X·plainᵀ‖ for all X; `weighted` where there are no weights.
        P: (p, k) with k = min(p, q).
        S: (k,), descending.
        Wt: (k, q).
    """

    left: Tensor
    up: Tensor
    balanced_A: Tensor
    right: Tensor
    weighted: Tensor
    plain: Tensor
    P: Tensor
    S: Tensor
    Wt: Tensor


def core_of(A: Tensor, B: Tensor, weights: Tensor | None = None) -> Core:
    """QR of both factors and the SVD of the core, in float64.

    Raises:
        MismatchError: A and B do not fit.
        NonFiniteError: NaN or infinity.
    """
    _check(A, B)
    A, B = _balanced(A.to(torch.float64), B.to(torch.float64), weights)
    left, up = torch.linalg.qr(B)
    right, down = torch.linalg.qr((A if weights is None else A * weights).T)
    plain = down if weights is None else torch.linalg.qr(A.T, mode="r").R
    P, S, Wt = torch.linalg.svd(up @ down.T, full_matrices=False)
    return Core(left, up, A, right.T, down, plain, P, S, Wt)


def _balanced(A: Tensor, B: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of A and columns of B of one size each, by powers of two."""
    if not A.shape[0]:
        return A, B
    _, below = torch.frexp((A if weights is None else A * weights).abs().amax(1))
    _, above = torch.frexp(B.abs().amax(0))
    shift = (above - below).div(2, rounding_mode="floor")
    return A * power_of_two(shift)[:, None], B * power_of_two(-shift)


def qr_core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orthonormal left (m, p) and right (q, n), up (p, R) and down (q, R): B·A = left·up·downᵀ·right."""
    A, B = _balanced(A.to(torch.float64), B.to(torch.float64), None)
    left, up = torch.linalg.qr(B)
    right, down = torch.linalg.qr(A.T)
    return left, up, down, right.T
