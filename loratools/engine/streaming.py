"""Which matrices of an extraction are too large to hold: they are read anew for every pass of the decomposition."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratools.engine import memory
from loratools.engine.plan import Unit
from loratools.engine.svd_options import AUTO

HELD: Final = 2**30
"""Bytes of the largest float32 difference that is held: a vocabulary of 64k tokens at width 4,096."""
_TILES: Final = 10  # of stored bytes: two tiles as read, their difference, its float64 form


def streamed(units: Sequence[Unit], tensors: int, limit: int | None) -> list[Unit]:
    """The units, those in passes whose difference is larger than `HELD`, or does not fit under the limit.

    Args:
        units: of an extraction.
        tensors: in all headers.
        limit: bytes that the process may take, or None.
    """
    fixed = memory.FIXED + memory.PER_TENSOR * tensors + memory.BUFFERS
    return [_streamed(unit, None if limit is None else limit - fixed) for unit in units]


def _streamed(unit: Unit, room: int | None) -> Unit:
    svd: Mapping[str, Any] = unit.parameters.get("svd", {})
    matrix = unit.parameters.get("matrix") if unit.operation == "extract" else None
    if not matrix or svd.get("rank") == AUTO or unit.parameters.get("activations"):
        return unit
    rows, columns = matrix
    fits = room is None or unit.peak_bytes <= room
    if 4 * rows * columns <= HELD and fits:
        return unit
    peak = bytes_in_passes(rows, columns, svd)
    if peak >= unit.peak_bytes:
        return unit
    return dataclasses.replace(unit, parameters={**unit.parameters, "streamed": True}, peak_bytes=peak)


def bytes_in_passes(rows: int, columns: int, svd: Mapping[str, Any]) -> int:
    """Working bytes of decomposing a matrix that is read anew for every pass."""
    from loratools.linalg import WHOLE_SPECTRUM, workspace_bytes

    rank = min(svd.get("rank") or svd["max_rank"], rows, columns)
    preset = "exact" if any(name in svd for name in WHOLE_SPECTRUM) else svd["preset"]
    tiles = _TILES * min(max(memory.TILE_BYTES, 4 * columns), 4 * rows * columns)
    return tiles + workspace_bytes(rows, columns, rank, preset=preset, streamed=True)
