"""Gradual underflow: numbers below the normal range stay what they are.

A processor may take them for zero (FTZ, DAZ on x86; FZ on ARM). `torch.set_flush_denormal` asks for it, and so does any
library linked with -ffast-math when it is loaded. Weights in float32 and bfloat16 have such numbers. Whether a thread
flushes is found by computing, not by asking a flag; threads inherit it from the one that starts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import torch

from loratools.errors import UnsupportedError

_COUNT: Final = 67  # whole vectors of any width, and a rest
_INTEGERS: Final = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_FROM: Final = {torch.float64: 1 << 14, torch.float32: 1 << 9, torch.bfloat16: 1 << 3}  # bits: a literal may be flushed
_CONVERTED: Final = ((torch.float32, 2.0**-140), (torch.bfloat16, 2.0**-130), (torch.float16, 2.0**-20))


@contextlib.contextmanager
def gradual_underflow() -> Iterator[None]:
    """Switch flushing to zero off while this thread computes, where it is on; then on again.

    Raises:
        UnsupportedError: it cannot be switched off here.
    """
    if not flushes():
        yield
        return
    torch.set_flush_denormal(False)
    try:
        if flushes():
            raise UnsupportedError(
                "This processor takes numbers below the normal range for zero, and does not stop doing so.",
                fix="Results would not be those of other machines. Is a library loaded that uses -ffast-math?",
            )
        yield
    finally:
        torch.set_flush_denormal(True)


def flushes() -> bool:
    """Whether this thread takes subnormal numbers for zero, as operands, as results, or in a conversion."""
    return any(_lost(dtype, bits) for dtype, bits in _FROM.items()) or any(
        _lost_on_the_way(*each) for each in _CONVERTED
    )


def _lost(dtype: torch.dtype, bits: int) -> bool:
    """In arithmetic: twice and half of a number and its difference with another, neither of which is normal."""
    smallest, small = (torch.full((_COUNT,), each, dtype=_INTEGERS[dtype.itemsize]).view(dtype) for each in (1, bits))
    wide = smallest.to(torch.float64) if dtype is not torch.float64 else smallest * 2.0
    results = (wide, small * 2.0, small * 0.5, small - small * 0.5)
    return not all(bool((result.to(torch.float64) != 0).all()) for result in results)


def _lost_on_the_way(dtype: torch.dtype, size: float) -> bool:
    """In rounding float64 by way of float32, and back."""
    there = torch.full((_COUNT,), size, dtype=torch.float64).to(torch.float32).to(dtype)
    return not bool((there.to(torch.float64) == size).all())
