"""The seam: one call, and behind it the algorithm that suits the shape, the goal and the preset."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loratools.errors import UsageError
from loratools.linalg._basis import AbstractBasis, HeldBasis
from loratools.linalg._dense import dense
from loratools.linalg._info import Goal, SVDInfo, make_goal
from loratools.linalg._krylov import Effort, block_krylov
from loratools.linalg._precision import full_float32
from loratools.linalg._prepare import AbstractMatrix, HeldMatrix, prepare
from loratools.linalg._ritz import Approximation, residual, triples
from loratools.linalg._streamed import ChunkedRows, StreamedBasis, StreamedMatrix
from loratools.linalg._workspace import LEAST_BLOCK, PRESETS, block_for, most_blocks, uses_dense

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratools.linalg._rules import RankRules

_TOLERANCE = 1e-3
_FAST_TOLERANCE = 1e-2
_RESIDUAL_DOUBT = 1e-6  # relative rounding error of a reported residual
_ENERGY_DOUBT = 4e-8  # of ‖M‖²: rounding error of energies from float32 products; up to 3.3e-8 measured


def truncated_svd(  # noqa: PLR0913
    M: Tensor | ChunkedRows,
    rank: int | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
    max_rank: int = 256,
    seed: int = 0,
    preset: str = "default",
    tolerance: float | None = None,
    overwrite: bool = False,
    **others: Unpack[RankRules],
) -> tuple[Tensor, Tensor, Tensor, SVDInfo]:
    """The leading singular triples of M; near-optimal in the Frobenius norm.

    Exactly one of `rank`, `energy`, `error` and the rules of `others` says how many. Small matrices, and ranks that are
    a large part of the shape, take a dense path in float64; others a randomised block Krylov iteration, which stops
    when it estimates residual/optimum − 1 ≤ 1e-3 or after 13 products with M.

    Law: orthonormal U and Vh to 1e-6; `info.residual` is that of the factors returned; directions at the float32
    floor (‖rest‖ ≤ 3e-7·‖M‖) are left out; equal seeds give equal results on one machine and thread count.

    Args:
        M: (m, n), float64, float32, float16 or bfloat16. Computed in float32, with float64 sums; magnitudes
            1e-38 to 1e30 are handled by scaling with a power of two. Or `ChunkedRows`, a matrix that is not held
            but read some ten times, in float32 chunks of rows.
        rank: number of triples.
        energy: keep the least r with ‖M_r‖² ≥ energy·‖M‖², in (0, 1].
        error: keep the least r with ‖M − M_r‖ ≤ error·‖M‖, in [0, 1).
        max_rank: largest rank that `energy` and `error` may choose; an explicit rank is not limited.
        seed: of the random start block.
        preset: `fast` (5 products, no certificate), `default` (a heuristic certificate), `certified` (one that fails
            with probability 1e-6; more products, 20 thin ones to prove it), `exact` (dense: O(m·n² + n³), proven).
        tolerance: the wanted residual/optimum − 1 instead of the preset's, for M that take the randomised path.
        overwrite: M may be scaled in place if it is float32 and needs it.
        others: `sv_ratio`: keep σ_i ≥ σ_1/sv_ratio. `sv_cumulative`: the least r whose σ sum to that share of Σσ.
            `sv_fro`: the least r with ‖M_r‖ ≥ sv_fro·‖M‖. `knee=True`: what comes before the knee, see
            `rank_at_knee`. `floor`: keep σ_i > floor, absolute. `sv_cumulative` and `knee` need every singular
            value, so they are dense: O(n³).

    Returns:
        U (m, r), S (r,), Vh (r, n), float32 on M's device, S descending; and what is known about them.

    Raises:
        UsageError: not exactly one goal, one out of range, an unknown preset.
        NonFiniteError: NaN or infinity in M, with their number.
        MismatchError, UnsupportedError: M is not a matrix of a float dtype.
    """
    goal = make_goal(rank, energy, error, max_rank, **others)
    if preset not in PRESETS:
        raise UsageError("There is no such preset.", preset=preset, fix=f"Choose one of {', '.join(PRESETS)}.")
    if tolerance is not None and tolerance <= 0:
        raise UsageError("A tolerance is above 0.", tolerance=tolerance)
    with full_float32():
        matrix = StreamedMatrix(M) if isinstance(M, ChunkedRows) else prepare(M, overwrite=overwrite)
        if matrix.total == 0:
            return _nothing(matrix, goal)
        goal = goal.scaled(matrix.exponent)
        return finish(matrix, goal, _approximate(matrix, goal, seed, preset, tolerance))


def balanced_factors(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Split U·diag(S)·Vh evenly.

    Args:
        U: (m, r).
        S: (r,), not negative.
        Vh: (r, n).

    Returns:
        lora_A (r, n) = √S·Vh and lora_B (m, r) = U·√S, so that B·A is the product and ‖A‖ = ‖B‖.
    """
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def _approximate(matrix: AbstractMatrix, goal: Goal, seed: int, preset: str, tolerance: float | None) -> Approximation:
    least = min(matrix.shape)
    block = min(block_for(goal.max_rank if goal.rank is None else goal.rank), least)
    quick = preset == "fast" or tolerance is not None
    if preset == "exact" or goal.whole or uses_dense(least, LEAST_BLOCK if goal.rank is None else block, quick=quick):
        return dense(matrix, goal)
    wanted = tolerance or (_FAST_TOLERANCE if preset == "fast" else _TOLERANCE)
    certified = preset == "certified"
    if goal.rank is None:
        narrow = Effort(LEAST_BLOCK, 3 + -(-goal.max_rank // LEAST_BLOCK), wanted, certified)
        found = block_krylov(_basis(matrix, narrow), goal, narrow, seed)
        if found.reached:
            return found
        if uses_dense(least, block):
            return dense(matrix, goal)
    effort = effort_for(goal, least, preset, tolerance)
    return block_krylov(_basis(matrix, effort), goal, effort, seed)


def effort_for(goal: Goal, least: int, preset: str, tolerance: float | None = None) -> Effort:
    """What a preset, or a tolerance, may spend on blocks as wide as the rank; `least` is the smaller side."""
    block = min(block_for(goal.max_rank if goal.rank is None else goal.rank), least)
    wanted = tolerance or (_FAST_TOLERANCE if preset == "fast" else _TOLERANCE)
    spend_all = preset == "fast" and goal.rank is not None and tolerance is None
    proven, eager = preset == "certified", tolerance is not None
    return Effort(block, most_blocks(preset), None if spend_all else wanted, proven, eager)


def _basis(matrix: AbstractMatrix, effort: Effort) -> AbstractBasis:
    capacity = min(effort.block * effort.blocks, *matrix.shape)
    if isinstance(matrix, StreamedMatrix):
        return StreamedBasis(matrix, capacity)
    assert isinstance(matrix, HeldMatrix)
    return HeldBasis(matrix, capacity)


def finish(matrix: AbstractMatrix, goal: Goal, found: Approximation) -> tuple[Tensor, Tensor, Tensor, SVDInfo]:
    """Triples and what is known of them, in the input's size and orientation."""
    answer = triples(found)
    left = residual(matrix, answer)
    total, unit = matrix.total, math.ldexp(1.0, matrix.exponent)
    certificate = _certificate(found, total, left)
    kind = None if certificate is None else "proven" if found.proven else "heuristic"
    U, Vh = answer.Ut.T.contiguous(), answer.Vt.contiguous()
    if matrix.flipped:
        U, Vh = Vh.T.contiguous(), U.T.contiguous()
    S = (answer.S * unit).to(U)
    info = SVDInfo(
        rank=S.numel(),
        captured=min(float(answer.S.square().sum()) / total, 1.0),
        residual=left * unit,
        certificate=certificate,
        certificate_kind=kind,
        products=found.products,
        method=found.method,
        norm=math.sqrt(total) * unit,
        clipped=goal.rank is not None and goal.rank > S.numel(),
        reached=found.reached,
    )
    return U, S, Vh, info


def _certificate(found: Approximation, total: float, left: float) -> float | None:
    if found.best is None or found.best >= total:
        return None
    rest = total - found.best
    doubt = _RESIDUAL_DOUBT + (_ENERGY_DOUBT * total / rest if found.products else 0.0)
    return max(left / math.sqrt(rest) - 1, 0.0) + doubt


def _nothing(matrix: AbstractMatrix, goal: Goal) -> tuple[Tensor, Tensor, Tensor, SVDInfo]:
    info = SVDInfo(0, 1.0, 0.0, None, None, 0, "zero", 0.0, goal.rank is not None, True)
    m, n = reversed(matrix.shape) if matrix.flipped else matrix.shape
    empty = torch.empty((m, 0), dtype=torch.float32, device=matrix.device)
    return empty, empty.new_empty(0), empty.new_empty((0, n)), info
