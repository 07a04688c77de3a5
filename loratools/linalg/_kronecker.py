"""Truncation of a Kronecker product through its two factors: neither the product nor its factors are formed whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loratools.linalg._core import chosen_of, decomposed_core
from loratools.linalg._info import SVDInfo, make_goal

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratools.linalg._rules import RankRules


def truncate_kronecker(
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    rank: int | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
    max_rank: int = 256,
    **others: Unpack[RankRules],
) -> tuple[Tensor, Tensor, Tensor, SVDInfo]:
    """The best approximation of (B₁A₁) ⊗ (B₂A₂), whose singular values are all products σ_i τ_j of the factors' own.

    With B₁A₁ = U S Vᵀ and B₂A₂ = X T Yᵀ the triple of σ_i τ_j is (U_i ⊗ X_j, V_i ⊗ Y_j) (Van Loan, "The ubiquitous
    Kronecker product", 2000, section 1). Two small decompositions, and memory for the r triples that are kept.

    Law: as for `truncate_low_rank`.

    Args:
        left: A₁ (r₁, c), B₁ (a, r₁), any float dtype.
        right: A₂ (r₂, d), B₂ (b, r₂).
        rank: as for `truncate_low_rank`, as are the other rules.
        energy: see rank.
        error: see rank.
        max_rank: see rank.
        others: see rank.

    Returns:
        U (a·b, r), S (r,), Vh (r, c·d) float32 and an `SVDInfo`, as `truncate_low_rank` does.

    Raises:
        MismatchError: two factors do not fit.
        NonFiniteError: NaN or infinity.
        UsageError: not exactly one goal.
    """
    goal = make_goal(rank, energy, error, max_rank, **others)
    (U, S, Vh), (X, T, Yh) = (_triples(*pair) for pair in (left, right))
    sigma, order = torch.outer(S, T).flatten().sort(descending=True, stable=True)
    info = chosen_of(goal, sigma)
    kept = order[: info.rank]
    i, j = kept // max(len(T), 1), kept % max(len(T), 1)
    columns = (U[:, None, i] * X[None, :, j]).flatten(0, 1)
    rows = (Vh[i, :, None] * Yh[j, None, :]).flatten(1)
    return columns.float(), sigma[: info.rank].float(), rows.float(), info


def _triples(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, P, S, Wt, right = decomposed_core(A, B)
    return left @ P, S, Wt @ right
