"""Rows as integers times a power of two, so that products of them add up without any rounding.

A sum of products b_k·a_k whose factors are integers is exact in float64, in whatever order the hardware
adds, as long as no partial sum passes 2^53. By Cauchy-Schwarz it cannot when the norms of b and a stay below
2^26.42. So every row of the left and every column of the right factor is rounded to a grid that its own norm
fixes; the product is then one number, whatever the BLAS, blocking, thread count or device.
The idea is that of Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication" (2012).

Norms are themselves found by sums of integers: nothing that decides about a grid depends on the order of a sum.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from loratools.errors import UnsupportedError
from loratools.linalg._rounding import power_of_two

LONGEST: Final = 2**17
"""The longest sum: up to here the products of first and second pieces stay below 2^53 too."""

_NORM_BITS: Final = 27  # a norm is below 2^27 / 1.5 grid units; the product of two is 0.89·2^53
_REST_BITS: Final = 18  # the second piece continues this many bits below the first
_FINEST: Final = -480  # units of two second pieces multiply to 2^-996, which is a normal number
_RANGE: Final = 960  # exponents that numbers are moved by, there and back, without leaving the normal range


def split(x: Tensor, dim: int, pieces: int) -> tuple[Tensor, ...]:
    """The matrix x as a sum of `pieces` terms on power-of-two grids, one grid per line along `dim`.

    With ‖·‖ the norm of a line, its first piece is off by at most 2^-26.4·‖·‖ an entry, the sum of two by 2^-44.4·‖·‖;
    2^-481 where that is larger.

    Args:
        x: (…, p, q) float64, finite.
        dim: the dimension that the product will sum over.
        pieces: 1 or 2.

    Returns:
        One or two float64 tensors like `x`. Their values depend on their own line only.

    Raises:
        UnsupportedError: lines longer than 2^17.
    """
    if x.shape[dim] > LONGEST:
        raise UnsupportedError(f"A sum of {x.shape[dim]} products is not formed exactly.", most=LONGEST)
    unit = norm_exponents(x, dim, margin=1.5).sub_(_NORM_BITS).clamp_min_(_FINEST)
    first = (x * power_of_two(-unit)).round_().mul_(power_of_two(unit))
    if pieces == 1:
        return (first,)
    finer = unit - _REST_BITS
    return first, ((x - first) * power_of_two(-finer)).round_().mul_(power_of_two(finer))


def norm_exponents(x: Tensor, dim: int, *, margin: float = 1.0) -> Tensor:
    """Exponents e with `margin`·‖line‖ < 2^e ≤ 4·`margin`·‖line‖, found without a sum that rounds.

    Args:
        x: (…, p, q) float64, finite.
        dim: along which the lines run; it stays, with one entry.
        margin: what the norm is multiplied by.

    Returns:
        int64; of a line of zeros the least that there is, -960.
    """
    width = max(x.shape[dim], 1)
    size = x.abs()
    largest = size.amax(dim, keepdim=True) if x.shape[dim] else size.sum(dim, keepdim=True)
    top = torch.frexp(largest)[1].to(torch.int64).clamp_min_(-_RANGE)
    bits = min(20, (53 - width.bit_length()) // 2)  # so that the squares below add up to less than 2^53
    coarse = size.mul_(power_of_two(bits - top)).floor_()
    bound = coarse.square_().sum(dim, keepdim=True).sqrt_() + math.sqrt(width)
    _, above = torch.frexp(bound * margin)
    return torch.where(largest == 0, -_RANGE, (top - bits + above).clamp_(-_RANGE, _RANGE))
