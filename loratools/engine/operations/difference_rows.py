"""The rows of W_tuned − W_base, read from both files whenever they are wanted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loratools.engine.context import Context
from loratools.engine.operations.tiles import difference_into, row_bytes, row_ranges
from loratools.linalg import AbstractRows
from loratools.tensors import TensorRef


class DifferenceRows(AbstractRows):
    """`tuned − base` in float32, a tile at a time; rows that only the tuned side has are not part of it.

    Attributes:
        weight_norm: ‖base‖_F, once the rows have been read.
    """

    def __init__(self, base: TensorRef, tuned: TensorRef, context: Context) -> None:
        self.shape = (base.shape[0], base.shape[1])
        self.device = torch.device(context.settings.device)
        self.weight_norm = 0.0
        self._base, self._tuned, self._context = base, tuned, context

    def chunks(self) -> Iterator[Tensor]:
        """See `AbstractRows.chunks`."""
        base, tuned, context = self._base, self._tuned, self._context
        squares = 0.0
        for first, last in row_ranges(base.shape, max(row_bytes(base), row_bytes(tuned)), context.settings.tile_bytes):
            context.check()
            before, after = base.rows(first, last), tuned.rows(first, last)
            rows = torch.empty(before.shape, dtype=torch.float32, device=self.device)
            tile = context.on_device(before.load(context.buffer("tile", before.nbytes)))
            other = context.on_device(after.load(context.buffer("tuned", after.nbytes)))
            squares += difference_into(rows, tile, other)
            yield rows
        self.weight_norm = squares**0.5
