"""The k-th largest size among the entries of a matrix that is only ever seen in parts: exact, in two passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor

_LOW: Final = 16
_BINS: Final = 1 << 16


def magnitude_threshold(read: Callable[[], Iterable[Tensor]], count: int) -> float:
    """The least number that the `count` largest |entries| reach.

    Sizes of float32 numbers are ordered as their bits are: a first pass counts the upper 16 bits, a second the lower
    ones within the bin where the count is reached.

    Law: what sorting all entries gives, whatever the parts.

    Args:
        read: the entries, float32 parts of any shape, the same numbers both times; finite.
        count: from 1 to their number.
    """
    upper = _counted(read, lambda bits: bits >> _LOW)
    high, above = _reached(upper, count)
    lower = _counted(read, lambda bits: bits[bits >> _LOW == high] & (_BINS - 1))
    low, _ = _reached(lower, count - above)
    return float(torch.tensor([high << _LOW | low], dtype=torch.int32).view(torch.float32))


def _counted(read: Callable[[], Iterable[Tensor]], chosen: Callable[[Tensor], Tensor]) -> Tensor:
    total = torch.zeros(_BINS, dtype=torch.int64)
    for part in read():
        bits = part.abs().reshape(-1).view(torch.int32)
        total += torch.bincount(chosen(bits).to("cpu", torch.int64), minlength=_BINS)
    return total


def _reached(bins: Tensor, count: int) -> tuple[int, int]:
    """The bin, from the top, in which the count is reached, and how many are above it."""
    reached = bins.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, count))
    return _BINS - 1 - place, int(reached[place - 1]) if place else 0
