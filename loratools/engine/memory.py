"""The memory model, one page.

    predicted peak = FIXED + TENSOR × (tensors in all headers) + working sets

`FIXED` is an interpreter with torch imported and its thread pools started. The working sets are those of the
`threads` largest units, since that many run at once; each unit's own bound is computed by its planner from
shapes (a merge works on row tiles, an extraction needs the float32 difference and the sketch of one matrix).
With a limit, units wait until their working sets fit together, and a plan whose largest unit does not fit
is refused before anything is written.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from loratools.engine.plan import Plan, Unit
from loratools.errors import MemoryLimitError
from loratools.tensors import TensorSpec

MIB: Final = 1024 * 1024
FIXED: Final = 270 * MIB
"""Resident memory after `import torch`, a first product and a first decomposition; measured, rounded up."""
PER_TENSOR: Final = 2600
"""Bytes per tensor of a header, kept as specs, references and plan units; measured, rounded up."""
TILE_BYTES: Final = 4 * MIB
"""Stored bytes of one row tile: large enough for a fast GEMM, small enough to stay near the cache."""
TILE_FACTOR: Final = 12
"""Working bytes per stored byte of a tile in a merge: the tile, a float64 sum, its rounding, and the result."""
FACTOR_BYTES: Final = 48
"""Working bytes per element of a factor: as read (4), scaled in float64 (8), pieces and their sums (36)."""
RECEIPT_ENTRIES: Final = 2**19
"""Entries whose corrections are worked out at a time."""
RECEIPT_FACTOR: Final = 80
"""Working bytes of each: masks, places, distances and their folded and encoded forms, if all were at risk."""
WIDE_ENTRIES: Final = 2**18
"""Entries of a row tile that is gone through in float64, many passes at a time: 2 MiB, to stay near the cache."""
BUFFERS: Final = 3 * 4 * MIB
"""Read and hash buffers of one worker."""


def predicted_peak(units: Iterable[Unit], tensors: int, threads: int, limit: int | None = None) -> int:
    """The predicted peak in bytes; with a limit, at most what waiting for room can bring it down to."""
    sets = heapq.nlargest(threads, (unit.peak_bytes + BUFFERS for unit in units))
    fixed = FIXED + PER_TENSOR * tensors
    together = fixed + sum(sets)
    if limit is None or not sets:
        return together
    return min(together, max(limit, fixed + sets[0]))


def room(units: Iterable[Unit], tensors: int, limit: int | None) -> int | None:
    """Bytes that working sets may take together under `limit`; None without a limit."""
    if limit is None:
        return None
    largest = max((unit.peak_bytes + BUFFERS for unit in units), default=0)
    return max(limit - FIXED - PER_TENSOR * tensors, largest)


def require(plan: Plan, limit: int | None) -> None:
    """Refuse a plan that cannot stay within `limit` bytes.

    Raises:
        MemoryLimitError: names the largest unit and the limit that would do.
    """
    if limit is None or plan.bounds.peak_bytes <= limit:
        return
    largest = max(plan.units, key=lambda unit: unit.peak_bytes, default=None)
    raise MemoryLimitError(
        f"The plan needs {-(-plan.bounds.peak_bytes // MIB)} MiB, the limit is {limit / MIB:.0f} MiB.",
        fix=f"Allow {-(-plan.bounds.peak_bytes // MIB)} MiB.",
        largest=largest.target if largest else "headers",
    )


def tile_bytes(spec: TensorSpec, tiles: int = 1) -> int:
    """Working bytes of going through a tensor by row tiles; a row longer than a tile is taken whole."""
    row = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else spec.nbytes
    return tiles * TILE_FACTOR * min(max(TILE_BYTES, row), max(spec.nbytes, 1))


def receipt_bytes(spec: TensorSpec) -> int:
    """Working bytes of recording a tensor for a receipt or reading it from one: a tile twice, a chunk's numbers."""
    return 2 * min(spec.nbytes, 2 * TILE_BYTES) + RECEIPT_FACTOR * min(spec.numel, RECEIPT_ENTRIES)


def factor_bytes(elements: int) -> int:
    """Working bytes of a low-rank product's factors: as read, in float64, and split into exact pieces."""
    return elements * FACTOR_BYTES


class Gate:
    """Lets units run as long as their working sets fit together; one alone always may."""

    def __init__(self, room: int | None) -> None:
        self._room = room
        self._used = 0
        self._condition = threading.Condition()

    @contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        """Wait for `nbytes` of room, and give them back."""
        with self._condition:
            self._condition.wait_for(lambda: self._room is None or not self._used or self._used + nbytes <= self._room)
            self._used += nbytes
        try:
            yield
        finally:
            with self._condition:
                self._used -= nbytes
                self._condition.notify_all()
