"""Whether one piece per factor keeps a product near enough: a proof from the factors themselves.

L·R is to be replaced by L₀·R₀, rounded factors. With e = L − L₀ and f = R − R₀, the difference is e·R + L·f − e·f, and
‖X·Y‖² = ⟨XᵀX, YYᵀ⟩ for each of these products: matrices of the size of the rank tell all norms. They are formed of
integers, and what these leave out is bounded, so the answer is proven, and the same on every machine.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
from torch import Tensor

from loratools.linalg._rounding import power_of_two

TOLERANCE: Final = 2e-7
MOST_COMPONENTS: Final = 512
"""Beyond these, uncorrelated components need a second piece anyway."""

_ROUNDING: Final = 2.0**-40
"""Relative, far above what the float64 arithmetic of this page can lose."""
_RANGE: Final = 960


@dataclasses.dataclass(frozen=True, slots=True)
class _Components:
    """The R components of one factor, to a part in a million.

    Attributes:
        gram: (R, R), their inner products after rounding, exact.
        norms: upper bounds of their norms.
        lost: upper bounds of the norms of what rounding took.
    """

    gram: Tensor
    norms: list[float]
    lost: list[float]

    @property
    def norm(self) -> float:
        """An upper bound of the norm of the factor."""
        return math.sqrt(math.fsum(norm * norm for norm in self.norms)) * (1 + _ROUNDING)


def one_piece_will_do(left: Tensor, right: Tensor, rounded: tuple[Tensor, Tensor]) -> bool:
    """Whether ‖L·R − L₀·R₀‖ ≤ 2e-7·‖L·R‖ in the Frobenius norm can be proven.

    Args:
        left: (m, R) float64.
        right: (R, n) float64.
        rounded: L₀ and R₀, `split` into one piece.
    """
    if left.shape[1] > MOST_COMPONENTS:
        return False
    if not left.numel() or not right.numel() or not bool(left.any()):
        return True
    unit = -int(torch.frexp(left.abs().amax())[1])  # sizes are relative, so that nothing leaves the range of floats
    L, R = _components(left.T, unit), _components(right, 0)
    least, _ = _norm(L, R)
    off_left, off_right = (left - rounded[0]).T, right - rounded[1]
    e, f = _components(off_left, unit, out=off_left), _components(off_right, 0, out=off_right)
    most = _norm(e, R)[1] + _norm(L, f)[1] + e.norm * f.norm
    return most * (1 + _ROUNDING) <= TOLERANCE * least


def _components(lines: Tensor, shift: int, out: Tensor | None = None) -> _Components:
    """Of 2^shift times the factor whose components are these lines, (R, p); `out` may be overwritten."""
    length = lines.shape[1]
    bits = min(20, (53 - length.bit_length()) // 2)  # so that inner products are below 2^53
    largest = lines.abs().amax(1)
    fine = (bits - torch.frexp(largest)[1].to(torch.int64)).clamp_max_(_RANGE)
    whole = torch.mul(lines, power_of_two(fine)[:, None], out=out).round_()
    unit = power_of_two((shift - fine).clamp_min_(-_RANGE // 2)) * (largest > 0)
    gram = torch.mm(whole, whole.T) * unit[:, None] * unit
    lost = (unit * (0.5 * math.sqrt(length))).tolist()
    norms = [math.sqrt(size) * (1 + _ROUNDING) + off for size, off in zip(gram.diagonal().tolist(), lost, strict=True)]
    return _Components(gram, norms, lost)


def _norm(X: _Components, Y: _Components) -> tuple[float, float]:
    """Bounds from below and above of ‖Σ_k x_k y_kᵀ‖: that of the rounded components, and what their rounding can do."""
    near = math.fsum((X.gram * Y.gram).flatten().tolist())
    slack = _ROUNDING * math.fsum(x * y for x, y in zip(X.norms, Y.norms, strict=True)) ** 2
    off = math.fsum(
        lost * norm + (size + lost) * missing
        for lost, size, norm, missing in zip(X.lost, X.norms, Y.norms, Y.lost, strict=True)
    ) * (1 + _ROUNDING)
    return math.sqrt(max(near - slack, 0.0)) - off, math.sqrt(near + slack) + off
