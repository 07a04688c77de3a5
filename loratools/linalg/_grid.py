"""The numbers of a dtype as a grid in float64: which of them a sum may have been rounded to.

Nothing is converted to the narrow dtype and nothing rounded with its own conversion, so that this is a path of its
own beside `_rounding`: a rounding is a division by the grid's step, which is a power of two, and back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.errors import UnsupportedError

_GRIDS = {
    torch.bfloat16: (7, -126),
    torch.float16: (10, -14),
    torch.float32: (23, -126),
    torch.float64: (52, -970),  # below 2^-970 the step is taken for larger than it is
}
"""Bits of the fraction, and the least exponent of a normal number, below which the step stays the same."""


def grid_step(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` in the binade that |x| lies in.

    Args:
        x: float64, finite, any shape.
        dtype: float64, float32, float16 or bfloat16.

    Returns:
        Float64 of the same shape; a power of two. Law: of a number of `dtype`, this is `ulp`.

    Raises:
        UnsupportedError: another dtype.
    """
    fraction, least = _grid(dtype)
    exponent = (x.contiguous().view(torch.int64) >> 52).bitwise_and_(0x7FF).clamp_min_(1023 + least)
    return exponent.sub_(fraction).bitwise_left_shift_(52).view(torch.float64)


def to_grid(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to the nearest number of `dtype`, ties to even, but kept in float64; what overflows is infinite.

    Args:
        x: float64, finite, any shape.
        dtype: float64, float32, float16 or bfloat16.
    """
    if dtype == torch.float64:
        return x
    step = grid_step(x, dtype)
    rounded = (x / step).round_().mul_(step)
    largest = torch.finfo(dtype).max
    return torch.where(rounded.abs() > largest, rounded.sign() * torch.inf, rounded)


def rounded_from(found: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether some number from `low` to `high` rounds to `found`; a number midway may go either way.

    Args:
        found: numbers of `dtype`, in float64.
        low: float64, of the same shape.
        high: float64, nowhere below `low`.
        dtype: float64, float32, float16 or bfloat16.

    Returns:
        A bool for every entry; False where `found` is not finite.
    """
    under, over = rounding_edges(found, dtype)
    return (high >= under).logical_and_(low <= over).logical_and_(torch.isfinite(found))


def rounding_edges(found: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The least and the greatest real number that may round to each of `found`: the middles to its neighbours.

    Args:
        found: finite numbers of `dtype`, in float64.
        dtype: float64, float32, float16 or bfloat16.

    Returns:
        Two float64 tensors of the same shape.
    """
    fraction, least = _grid(dtype)
    bits = found.contiguous().view(torch.int64)
    exponent = (bits >> 52).bitwise_and_(0x7FF)
    half = exponent.clamp_min(1023 + least).sub_(fraction + 1).bitwise_left_shift_(52).view(torch.float64)
    corner = (bits.bitwise_and((1 << 52) - 1) == 0).logical_and_(exponent > 1023 + least)
    inner = torch.where(corner, half * 0.5, half)  # towards zero, a power of two has its neighbour half as far
    under = found - torch.where(found > 0, inner, half)
    over = found + torch.where(found < 0, inner, half)
    return under, over


def _grid(dtype: torch.dtype) -> tuple[int, int]:
    if dtype not in _GRIDS:
        raise UnsupportedError("The grids known are those of float64, float32, float16 and bfloat16.", dtype=dtype)
    return _GRIDS[dtype]
