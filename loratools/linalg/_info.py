"""What a truncation reports, and what it was asked for."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from torch import Tensor

from loratools.errors import UsageError
from loratools.linalg._rank import (
    FLOAT32_FLOOR,
    rank_above,
    rank_at_knee,
    rank_for_cumulative,
    rank_for_ratio,
    rank_for_tail,
    tails,
)
from loratools.linalg._rules import WHOLE_SPECTRUM, RankRules, given_rule

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    """One rule; see `make_goal`.

    Attributes:
        rank: an explicit rank, or None.
        tail: residual²/‖M‖² that the rule allows; 1 for rules that only count singular values.
        max_rank: cap on what a rule may choose.
        rule: `tail`, or the name of a rule that counts.
        value: of a rule that counts.
    """

    rank: int | None
    tail: float
    max_rank: int
    rule: str = "tail"
    value: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether `choose` needs every singular value."""
        return self.rule in WHOLE_SPECTRUM

    def scaled(self, exponent: int) -> Goal:
        """The same goal for 2^-exponent times the matrix."""
        if self.rule != "floor":
            return self
        return dataclasses.replace(self, value=math.ldexp(self.value, -exponent))

    def choose(self, sigma2: Tensor, total: float) -> tuple[int, bool]:
        """Rank for the squared singular values known so far (descending, float64), and whether it meets the goal."""
        if self.rank is not None:
            return min(self.rank, sigma2.numel()), True
        if self.rule == "tail":
            rank = min(rank_for_tail(sigma2, total, self.tail), self.max_rank)
            return rank, bool(tails(sigma2, total)[rank] <= (self.tail + FLOAT32_FLOOR) * total)
        wanted = self._count(sigma2)
        last = wanted < sigma2.numel() or float(tails(sigma2, total)[-1]) <= FLOAT32_FLOOR * total
        return min(wanted, self.max_rank), last and wanted <= self.max_rank

    def _count(self, sigma2: Tensor) -> int:
        if self.rule == "sv_ratio":
            return rank_for_ratio(sigma2, self.value)
        if self.rule == "floor":
            return rank_above(sigma2, self.value)
        return rank_at_knee(sigma2) if self.rule == "knee" else rank_for_cumulative(sigma2, self.value)


def make_goal(
    rank: int | None, energy: float | None, error: float | None, max_rank: int, **others: Unpack[RankRules]
) -> Goal:
    """Check the ways to say how much to keep, and unify them.

    Raises:
        UsageError: not exactly one of them, or out of range.
    """
    given = given_rule({"rank": rank, "energy": energy, "error": error, **others})
    if given is None:
        raise UsageError("A rank, an energy, an error or another rule has to say how much to keep.")
    if max_rank < 1:
        raise UsageError("max_rank must be at least 1.", max_rank=max_rank)
    name, value = given
    if name == "rank":
        return Goal(int(value), 0.0, max_rank)
    allowed = {"energy": lambda: 1.0 - value, "error": lambda: value * value, "sv_fro": lambda: 1.0 - value * value}
    if name in allowed:
        return Goal(None, allowed[name](), max_rank)
    return Goal(None, 1.0, max_rank, name, float(value))
