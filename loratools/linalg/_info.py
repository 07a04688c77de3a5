"""What a truncation reports, and what it was asked for."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from loratools.errors import UsageError
from loratools.linalg._rank import FLOAT32_FLOOR, rank_for_tail, tails


@dataclasses.dataclass(frozen=True, slots=True)
class SVDInfo:
    """How good a truncation is and what it took.

    Attributes:
        rank: columns returned.
        captured: ‖Δ̂‖²/‖M‖², in [0, 1]; 1 for a zero matrix.
        residual: ‖M − U·diag(S)·Vh‖_F, absolute.
        certificate: upper bound on residual/optimum − 1, or None where nothing is claimed.
        certificate_kind: `proven`, `heuristic` or None.
        products: multiplications with M or Mᵀ; 0 for a dense method.
        method: `zero`, `dense`, `block-krylov` or `qr-core`.
        norm: ‖M‖_F.
        clipped: a larger rank was asked for than exists above the float32 floor.
        reached: the energy or error goal is met; always true for an explicit rank.
    """

    rank: int
    captured: float
    residual: float
    certificate: float | None
    certificate_kind: str | None
    products: int
    method: str
    norm: float
    clipped: bool
    reached: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """One of an explicit rank, an energy, an error; see `make_goal`."""

    rank: int | None
    tail: float  # allowed residual²/‖M‖²
    max_rank: int

    def choose(self, sigma2: Tensor, total: float) -> tuple[int, bool]:
        """Rank for the squared singular values known so far (descending, float64), and whether it meets the goal."""
        if self.rank is not None:
            return min(self.rank, sigma2.numel()), True
        wanted = rank_for_tail(sigma2, total, self.tail)
        rank = min(wanted, self.max_rank)
        return rank, bool(tails(sigma2, total)[rank] <= (self.tail + FLOAT32_FLOOR) * total)


def make_goal(rank: int | None, energy: float | None, error: float | None, max_rank: int) -> Goal:
    """Check the three ways to say how much to keep, and unify them.

    Raises:
        UsageError: not exactly one of them, or out of range.
    """
    if sum(value is not None for value in (rank, energy, error)) != 1:
        raise UsageError("Exactly one of rank, energy and error says how much to keep.")
    if max_rank < 1:
        raise UsageError("max_rank must be at least 1.", max_rank=max_rank)
    if rank is not None:
        if rank < 1:
            raise UsageError("The rank must be at least 1.", rank=rank)
        return Goal(rank, 0.0, max_rank)
    if energy is not None:
        if not 0 < energy <= 1:
            raise UsageError("The energy must lie in (0, 1].", energy=energy)
        return Goal(None, 1.0 - energy, max_rank)
    if error is None or not 0 <= error < 1:
        raise UsageError("The error must lie in [0, 1).", error=error)
    return Goal(None, error * error, max_rank)
