"""The rows of W_tuned − W_base, read from both files whenever they are wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loratools.engine.context import Context
from loratools.engine.operations.tiles import difference_into, row_bytes, row_ranges
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratools.linalg import ChunkedRows


class DifferenceRows:
    """`tuned − base` in float32, a tile at a time; rows that only the tuned side has are not part of it."""

    def __init__(self, base: TensorRef, tuned: TensorRef, context: Context) -> None:
        self._base, self._tuned, self._context = base, tuned, context
        self._squares: float = 0.0

    @property
    def weight_norm(self) -> float:
        """‖base‖_F, once the rows have been read."""
        return math.sqrt(self._squares)

    def chunked(self) -> ChunkedRows:
        """For `truncated_svd`."""
        import torch

        from loratools.linalg import ChunkedRows

        shape = self._base.shape[0], self._base.shape[1]
        return ChunkedRows(shape, torch.device(self._context.settings.device), self._read)

    def _read(self) -> Iterator[torch.Tensor]:
        import torch

        base, tuned, context = self._base, self._tuned, self._context
        squares = torch.zeros((), dtype=torch.float64, device=context.settings.device)
        for first, last in row_ranges(base.shape, max(row_bytes(base), row_bytes(tuned)), context.settings.tile_bytes):
            context.check()
            before, after = base.rows(first, last), tuned.rows(first, last)
            rows = torch.empty(before.shape, dtype=torch.float32, device=context.settings.device)
            tile = context.on_device(before.load(context.buffer("tile", before.nbytes)))
            other = context.on_device(after.load(context.buffer("tuned", after.nbytes)))
            squares += difference_into(rows, tile, other)
            yield rows
        self._squares = float(squares)
