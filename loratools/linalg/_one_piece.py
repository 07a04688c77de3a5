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

from loratools.linalg._host import to_host
from loratools.linalg._rounding import power_of_two

TOLERANCE: Final = 2e-7
MOST_COMPONENTS: Final = 512
"""Beyond these, uncorrelated components need a second piece anyway."""

_ROUNDING: Final = 2.0**-40
"""Relative, far above what the float64 arithmetic of this page can lose."""
_RANGE: Final = 960


def one_piece_will_do(left: Tensor, right: Tensor, rounded: tuple[Tensor, Tensor]) -> bool:
    """Whether ‖L·R − L₀·R₀‖ ≤ 2e-7·‖L·R‖ in the Frobenius norm can be proven; waits once for a device.

    Args:
        left: (m, R) float64.
        right: (R, n) float64.
        rounded: L₀ and R₀, `split` into one piece.
    """
    if left.shape[1] > MOST_COMPONENTS:
        return False
    if not left.numel() or not right.numel():
        return True
    unit = -torch.frexp(left.abs().amax())[1].to(torch.int64)  # sizes are relative: none leaves the range of floats
    off_left, off_right = (left - rounded[0]).T, right - rounded[1]
    grams, lost = zip(
        _components(left.T, unit),
        _components(right, torch.zeros_like(unit)),
        _components(off_left, unit, out=off_left),
        _components(off_right, torch.zeros_like(unit), out=off_right),
        strict=True,
    )
    inner = [grams[x] * grams[y] for x, y in ((0, 1), (2, 1), (0, 3))]
    sizes = torch.stack([gram.diagonal() for gram in grams])
    return _proven(*to_host(torch.stack(inner), sizes, torch.stack(lost)))


def _components(lines: Tensor, shift: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The components of 2^shift times a factor, to twenty bits: their inner products, and what rounding took at most.

    Args:
        lines: (R, p), the components.
        shift: an integer.
        out: what may be overwritten.

    Returns:
        (R, R), exact; (R,), bounds of the norms of the rests.
    """
    length = lines.shape[1]
    bits = min(20, (53 - length.bit_length()) // 2)  # so that inner products are below 2^53
    largest = lines.abs().amax(1)
    fine = (bits - torch.frexp(largest)[1].to(torch.int64)).clamp_max_(_RANGE)
    whole = torch.mul(lines, power_of_two(fine)[:, None], out=out).round_()
    unit = power_of_two((shift - fine).clamp_min_(-_RANGE // 2)) * (largest > 0)
    return torch.mm(whole, whole.T) * unit[:, None] * unit, unit * (0.5 * math.sqrt(length))


@dataclasses.dataclass(frozen=True, slots=True)
class _Sizes:
    """Upper bounds of the norms of a factor's components, and of what rounding took of each."""

    norms: list[float]
    lost: list[float]

    @property
    def norm(self) -> float:
        """An upper bound of the norm of the factor."""
        return math.sqrt(math.fsum(norm * norm for norm in self.norms)) * (1 + _ROUNDING)


def _proven(inner: Tensor, squares: Tensor, lost: Tensor) -> bool:
    """The proof, from inner products of L with R, e with R, and L with f, and the sizes of all four; on the CPU."""
    L, R, e, f = (
        _Sizes([math.sqrt(size) * (1 + _ROUNDING) + off for size, off in zip(mine, rests, strict=True)], rests)
        for mine, rests in zip(squares.tolist(), lost.tolist(), strict=True)
    )
    if not any(L.norms):
        return True
    least, _ = _norm(inner[0], L, R)
    most = _norm(inner[1], e, R)[1] + _norm(inner[2], L, f)[1] + e.norm * f.norm
    return most * (1 + _ROUNDING) <= TOLERANCE * least


def _norm(inner: Tensor, X: _Sizes, Y: _Sizes) -> tuple[float, float]:
    """Bounds from below and above of ‖Σ_k x_k y_kᵀ‖: that of the rounded components, and what their rounding can do."""
    near = math.fsum(inner.flatten().tolist())
    slack = _ROUNDING * math.fsum(x * y for x, y in zip(X.norms, Y.norms, strict=True)) ** 2
    off = math.fsum(
        lost * norm + (size + lost) * missing
        for lost, size, norm, missing in zip(X.lost, X.norms, Y.norms, Y.lost, strict=True)
    ) * (1 + _ROUNDING)
    return math.sqrt(max(near - slack, 0.0)) - off, math.sqrt(near + slack) + off
