"""Rows as integers times a power of two, so that products of them add up without any rounding.

A sum of products b_k·a_k whose factors are integers is exact in float64, in whatever order the hardware
adds, as long as no partial sum passes 2^53. By Cauchy-Schwarz it cannot when the norms of b and a stay below
2^26.42. So every row of the left and every column of the right factor is rounded to a grid that its own norm
fixes; the product is then one number, whatever the BLAS, blocking, thread count or device.
The idea is that of Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication" (2012).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.linalg._rounding import power_of_two

_NORM_BITS = 27  # a norm is below 2^27 / 1.5 grid units; the product of two is 0.89·2^53
_REST_BITS = 18  # the second piece continues this many bits below the first


def split(x: Tensor, dim: int, pieces: int) -> tuple[Tensor, ...]:
    """The matrix x as a sum of `pieces` terms on power-of-two grids, one grid per line along `dim`.

    Args:
        x: (p, q) float64, finite.
        dim: the dimension that the product will sum over.
        pieces: 1 (26 bits below the norm of the line) or 2 (44 bits).

    Returns:
        One or two float64 tensors like `x`. Their values depend on their own line only.
    """
    unit = _grid(x, dim)
    first = (x * power_of_two(-unit)).round_().mul_(power_of_two(unit))
    if pieces == 1:
        return (first,)
    finer = unit - _REST_BITS
    return first, ((x - first) * power_of_two(-finer)).round_().mul_(power_of_two(finer))


def _grid(x: Tensor, dim: int) -> Tensor:
    """The exponent of each line's grid unit, from a norm that is summed exactly and so in any order."""
    width = max(x.shape[dim], 1)
    _, top = torch.frexp(x.abs().amax(dim, keepdim=True))
    bits = min(20, (53 - width.bit_length()) // 2)
    coarse = (x.abs() * power_of_two(bits - top)).floor_()
    bound = coarse.square_().sum(dim, keepdim=True).sqrt_() + width**0.5
    _, above = torch.frexp(bound * 1.5)
    return top - bits + above - _NORM_BITS
