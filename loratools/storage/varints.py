"""Integers of any size as few bytes: LEB128, little end first, signed ones folded onto unsigned ones before.

The encoding is that of DWARF and Protocol Buffers (https://dwarfstd.org/doc/DWARF5.pdf, 7.6;
https://protobuf.dev/programming-guides/encoding/#signed-ints), here for arrays at a time.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from loratools.errors import MalformedError

_BITS: Final = 7
_MOST: Final = 10
"""Bytes of the largest number of 64 bits."""


def folded(values: NDArray[np.int64]) -> NDArray[np.uint64]:
    """0, −1, 1, −2, … as 0, 1, 2, 3, …: small numbers of either sign become small ones without."""
    return ((values << 1) ^ (values >> 63)).view(np.uint64)


def unfolded(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The inverse of `folded`."""
    one = np.uint64(1)
    return ((values >> one) ^ (np.uint64(0) - (values & one))).view(np.int64)


def encode(values: NDArray[np.uint64]) -> bytes:
    """The numbers one after the other; those below 128 take one byte each, of 64 bits ten at most."""
    values = values.astype(np.uint64, copy=False)
    if not len(values) or int(values.max()) < 1 << _BITS:
        return values.astype(np.uint8).tobytes()
    lengths = np.ones(len(values), np.int64)
    for shift in range(_BITS, 64, _BITS):
        lengths += values >> np.uint64(shift) != 0
    starts = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), np.uint8)
    for index in range(int(lengths.max())):
        mine = lengths > index
        low = (values[mine] >> np.uint64(_BITS * index)) & np.uint64(0x7F)
        out[starts[mine] + index] = low.astype(np.uint8) | ((lengths[mine] > index + 1).astype(np.uint8) << 7)
    return out.tobytes()


def decode(data: bytes | memoryview, count: int, *, what: str) -> tuple[NDArray[np.uint64], int]:
    """The first `count` numbers in `data`, and where the next one would begin.

    Args:
        data: what `encode` gave, and more after it.
        count: how many numbers.
        what: a name for messages.

    Raises:
        MalformedError: there are fewer numbers, or one takes more than 64 bits.
    """
    given = np.frombuffer(data, np.uint8)
    if len(given) >= count and not (given[:count] & 0x80).any():
        return given[:count].astype(np.uint64), count
    ends = np.flatnonzero(given < 1 << _BITS)[:count]
    if len(ends) < count:
        raise MalformedError(f"{count} numbers are due, and {len(ends)} are there.", where=what)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    too_long = lengths > _MOST
    if too_long.any() or (given[ends[lengths == _MOST]] > 1).any():
        raise MalformedError("A number takes more than 64 bits.", where=what)
    values = np.zeros(count, np.uint64)
    for index in range(int(lengths.max())):
        mine = lengths > index
        part = (given[starts[mine] + index] & 0x7F).astype(np.uint64)
        values[mine] |= part << np.uint64(_BITS * index)
    return values, int(ends[-1]) + 1
