"""Sums of squares along rows that are the same bits in any order and however the columns come in pieces.

Every square is cut at the same places, the powers of 2^26. What lies between two cuts is an integer below 2^26 times
a power of two, and sums of those are exact in float64; the three highest that a row reaches are kept. The idea is that
of Demmel and Nguyen, "Parallel reproducible summation" (2015).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from loratools.linalg._rounding import power_of_two

_WIDTH: Final = 26  # bits between cuts: 2^27 squares may be added
_KEPT: Final = 3
_LOWEST: Final = -36  # of the highest cut, so that the lowest kept one is a normal number: 2^-988
_HIGHEST: Final = 38


class SquareSums:
    """Σ x² of each row, taken in piece by piece.

    Law: `totals` depends on the numbers of each row alone: not on their order, on pieces, threads or the device. It is
    right to 2^-51 per number that was added, relative, as long as squares lie between 2^-936 and 2^1014.
    """

    def __init__(self, rows: int, device: torch.device | None = None) -> None:
        """Begin with zero.

        Args:
            rows: how many.
            device: where; default the CPU.
        """
        self._top = torch.full((rows,), _LOWEST, dtype=torch.int64, device=device)
        self._sums = torch.zeros((rows, _KEPT), dtype=torch.float64, device=device)

    def add(self, x: Tensor, rows: slice) -> None:
        """Take in numbers of some rows.

        Args:
            x: (rows, any) float64, finite; not changed.
            rows: which rows these are.
        """
        if not x.numel():
            return
        rest = x.square()
        largest = rest.amax(1)
        top = torch.frexp(largest)[1].to(torch.int64).sub_(1).div_(_WIDTH, rounding_mode="floor")
        top = torch.where(largest > 0, top.clamp_(_LOWEST, _HIGHEST), _LOWEST)
        top = torch.maximum(top, self._top[rows])
        fresh = torch.empty((x.shape[0], _KEPT), dtype=torch.float64, device=x.device)
        for index in range(_KEPT):
            cut = power_of_two((top - index) * _WIDTH)
            whole = torch.mul(rest, power_of_two((index - top) * _WIDTH)[:, None]).floor_()
            fresh[:, index] = whole.sum(1)
            rest.sub_(whole.mul_(cut[:, None]))
        self._sums[rows] = self._moved(self._sums[rows], top - self._top[rows]) + fresh
        self._top[rows] = top

    def totals(self) -> Tensor:
        """The sums so far: (rows,), float64."""
        step = 2.0**-_WIDTH
        total = self._sums[:, _KEPT - 1]
        for index in range(_KEPT - 2, -1, -1):
            total = total * step + self._sums[:, index]
        return total * power_of_two(self._top * _WIDTH)

    @staticmethod
    def _moved(sums: Tensor, steps: Tensor) -> Tensor:
        """What was kept below a lower cut, below one so many steps higher."""
        places = torch.arange(_KEPT, device=sums.device) - steps[:, None]
        return torch.where(places >= 0, sums.gather(1, places.clamp_min(0)), 0.0)


def square_sums(x: Tensor) -> Tensor:
    """Σ x² of each row of (rows, any), float64, as `SquareSums` has it."""
    sums = SquareSums(x.shape[0], x.device)
    sums.add(x, slice(0, x.shape[0]))
    return sums.totals()
