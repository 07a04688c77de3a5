"""Actions on whole rows of a weight, each row for itself: rotations and reflections of the input."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Final

from loratools.adapters.actions import AbstractAction, Region

if TYPE_CHECKING:
    import torch

_ROWS: Final = 64


class AbstractRowAction(AbstractAction):
    """W' row by row, in float64, in blocks of 64 rows counted from the weight's first.

    A BLAS may sum in another order for another number of rows or another place in memory. A block is therefore always
    as large, starts in a buffer of its own, and is filled with zeros where a tile ends inside it: how the weight is cut
    into tiles changes no bit of the result.
    """

    @abc.abstractmethod
    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows of W': (64, in), float64; `rows` may be overwritten."""

    def all_moved(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """W' in a region of whole rows."""
        import torch

        result = torch.empty(base.shape, dtype=torch.float64, device=base.device)
        start, stop = region.rows.start, region.rows.stop
        for first in range(start - start % _ROWS, stop, _ROWS):
            block = torch.zeros((_ROWS, base.shape[1]), dtype=torch.float64, device=base.device)
            low, high = max(first, start), min(first + _ROWS, stop)
            block[low - first : high - first] = base[low - start : high - start]
            result[low - start : high - start] = self.moved(block)[low - first : high - first]
        return result

    def change(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """See `AbstractAction.change`."""
        return self.all_moved(base, region).sub_(base)
